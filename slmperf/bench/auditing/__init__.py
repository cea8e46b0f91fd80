"""One training step looked at from outside, and what it does beside its formula.

step      audit: the whole of it, in order
script    slmperf audit --trainer SCRIPT: a training script up to one step of its trainer
report    what an audit is told (Formula) and what it says (AuditReport)
capture   watching a step, and running its loss again on what was seen
rows      where in a step the logits are, and which labels, weights and teacher belong to them
exact     the gradient in float64, and how far the step's own is from it
terms     what the loss is made of: its gradient as a sum of those of known terms
outside   gradient that does not come through the logits
cost      time of the step's parts, memory, shares of the roof
findings  what differs, in sentences
"""
