"""The distillation loss on whole heads: kd_loss beside the products it cannot avoid, and others.

problems   sizes and inputs: any two heads, and the quickstart's training step
studies    which problems are timed in turns
ways       how a problem is computed: kd_loss, plain torch, torch.compile, Liger, products alone
peaks      the most memory that a way holds, on a CPU in a process of its own
measure    times in turns, memory and errors of the gradients: rows
report     tables and lines

`slmperf bench ops` times single ops on one case after the other; here what counts is how a whole
step compares with its matrix products, how much it holds, and how exact it is.
"""
