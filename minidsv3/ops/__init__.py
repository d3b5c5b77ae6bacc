"""The ops of the model: forward and backward side by side, on plain ndarrays.

An op knows nothing of modules, configs or ranks. Its shapes are checked on entry, float32 in gives float32 out, and
every op has a gradient check in ``tests/test_ops_gradients.py``. Where speed hides the mathematics, the textbook form
stands in `ops.plain`, with the same interface, for `autograd.replacing`.
"""
