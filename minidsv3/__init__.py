"""minidsv3: the whole DeepSeek-V3 system on one machine, in NumPy that a student can step through."""

from .config import ModelConfig, TrainConfig
from .generation import Generation, LatentCache, generate
from .model.record import record
from .model.transformer import Losses, Transformer
from .pretrained import load_pretrained, save_pretrained

__all__ = [
    "Generation",
    "LatentCache",
    "Losses",
    "ModelConfig",
    "TrainConfig",
    "Transformer",
    "generate",
    "load_pretrained",
    "record",
    "save_pretrained",
]
__version__ = "0.1.0"
