"""minidsv3: the whole DeepSeek-V3 system on one machine, in NumPy that a student can step through."""

from .config import ModelConfig, TrainConfig
from .model.record import record
from .model.transformer import Losses, Transformer

__all__ = ["Losses", "ModelConfig", "TrainConfig", "Transformer", "record"]
__version__ = "0.1.0"
