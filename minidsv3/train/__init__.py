"""Training: `step` holds the whole mathematics of a step, the rest is what surrounds it.

schedule says how fast, optim how a gradient becomes a step, balance how the routing stays even, evaluate how good the
model is; checkpoint, runs and trainer are files, progress and signals; figures draws.
"""
