"""Released checkpoints in and out: config.json and safetensors under the released names."""

from .reader import load_pretrained
from .writer import save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
