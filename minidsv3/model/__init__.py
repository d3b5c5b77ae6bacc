"""The model: modules hold parameters and say the forward pass; derivatives live in `minidsv3.ops`.

Reading order: transformer, mla, moe, mtp; layers and module are what they are made of, record looks inside.
"""
