"""Text from a trained model: `generate` with a latent cache and speculation, `sample` without either."""

from .cache import LatentCache
from .generate import Generation, generate
from .sampler import sample

__all__ = ["Generation", "LatentCache", "generate", "sample"]
