"""One optimizer step of distillation as a whole: our loss and trainer beside plain torch and Liger.

problems   two models, a batch, how many of its tokens are answers, checkpointing, number format
counts     operations and bytes of a step, before anything is measured: what should move by how much
ways       from models and batch to the loss: plain torch, torch.compile, Liger, kd_loss
loop       a step in a bare loop, and the same inside slmperf's DistillationTrainer
peaks      the most memory that a step holds, on a CPU in a process of its own
studies    which problems are measured
measure    times in turns and memory: rows
report     tables and lines

`slmperf bench kd` looks at the loss alone; here stands what it comes to in a training step, where
the layers of two models take their share.
"""
