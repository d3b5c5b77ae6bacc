"""The 671B bill: parameters, FLOPs, memory, caches and GPUs of a model, and the published numbers beside ours.

Reading order: params, flops, activations, memory, inference; then paper, which puts every published figure beside the
function that computes it.
"""
