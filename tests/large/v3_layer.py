"""One real decoder layer at the DeepSeek-V3 shapes, run forward on a CPU straight from its FP8 shards.

    python tests/large/v3_layer.py make DIR     about 11.5 GB of random FP8 weights in shards, with an index
    python tests/large/v3_layer.py run DIR      8 tokens through the layer; only the experts they use are read

Not part of the test suite: it needs 12 GB of disk. `run` prints the experts read, the bytes read and the peak memory.
The weights are random, but names, shapes, blocks and scales are those of the released layer.
"""

import argparse
import dataclasses
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from minidsv3 import ModelConfig
from minidsv3.autograd import Tensor, no_grad
from minidsv3.model.mla import MLA
from minidsv3.model.moe import Gate
from minidsv3.model.transformer import DecoderLayer
from minidsv3.ops.rope import rotation_table
from minidsv3.ops.swiglu import sigmoid
from minidsv3.pretrained.reader import SCALE, TensorFile
from minidsv3.pretrained.tensors import Planned
from minidsv3.pretrained.writer import QUANTIZED, write_config, write_shards
from minidsv3.quant.blockwise import dequantize, scale_shape
from minidsv3.quant.formats import BF16, E4M3

LAYER = 3  # the first with routed experts


def config() -> ModelConfig:
    """DeepSeek-V3 cut to one layer with experts (its number is kept in the tensors' names)."""
    return dataclasses.replace(ModelConfig.preset("deepseek-v3"), num_nextn_predict_layers=0)


def make(folder: Path) -> None:
    """Write the layer: E4M3 codes drawn at random, scales that give weights of about 0.006."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    layer = DecoderLayer(config(), LAYER, None, dispatcher=None)
    table = (rng.standard_normal(1 << 16) * 100).clip(-448, 448).astype(E4M3)  # codes of a normal distribution

    def codes(shape):
        return table[rng.integers(0, len(table), shape, dtype=np.uint16)]

    planned = []
    for name, parameter in [*layer.named_parameters(), *layer.named_buffers()]:
        full, shape = f"model.layers.{LAYER}.{name}", parameter.shape
        if name.split(".")[-2] in QUANTIZED:
            planned.append(Planned(full, E4M3, shape, lambda s=shape: codes(s)))
            s = scale_shape(shape)
            planned.append(
                Planned(full + SCALE, np.dtype(np.float32), s, lambda s=s: np.full(s, 6e-5, dtype=np.float32))
            )
        elif len(shape) == 2:
            planned.append(Planned(full, BF16, shape, lambda s=shape: (0.006 * rng.standard_normal(s)).astype(BF16)))
        else:
            dtype = np.dtype(np.float32) if "bias" in name else BF16
            fill = 0 if "bias" in name else 1
            planned.append(Planned(full, dtype, shape, lambda s=shape, d=dtype, f=fill: np.full(s, f, dtype=d)))
    total = sum(t.nbytes for t in planned)
    print(f"writing {total / 1e9:.2f} GB in {len(planned)} tensors")
    write_shards(planned, folder, 4_300_000_000)
    write_config(config(), folder, "fp8")


class Shards:
    """The layer's tensors by name, mapped; counts what is read."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        files = {name: TensorFile(folder / name) for name in set(index.values())}
        self._file = {name: files[file] for name, file in index.items()}
        self.bytes_read = 0

    def read(self, name: str) -> np.ndarray:
        """Values of a tensor, float32."""
        full = f"model.layers.{LAYER}.{name}"
        stored = self._file[full].array(full)
        self.bytes_read += stored.nbytes
        if stored.dtype != E4M3:
            return stored.astype(np.float32)
        return dequantize(stored, self._file[full + SCALE].array(full + SCALE))

    def fill(self, module, prefix: str) -> None:
        """Fill a module's parameters and buffers."""
        module.allocate(np.float32)
        for name, parameter in module.named_parameters():
            parameter.data[...] = self.read(prefix + name)
        for name, buffer in module.named_buffers():
            buffer[...] = self.read(prefix + name)


def run(folder: Path, tokens: int) -> None:
    """Forward pass of the layer, module after module; an expert is read when its first token arrives."""
    cfg, shards, start = config(), Shards(folder), time.perf_counter()
    x = np.random.default_rng(1).standard_normal((1, tokens, cfg.hidden_size), dtype=np.float32)
    rotation = rotation_table(np.arange(tokens), cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling, np.float32)
    with no_grad():
        attention = MLA(cfg)
        shards.fill(attention, "self_attn.")
        x = x + attention(Tensor(_norm(x, shards.read("input_layernorm.weight"))), rotation).data
        del attention
        gate = Gate(cfg)
        shards.fill(gate, "mlp.gate.")
        y = _norm(x, shards.read("post_attention_layernorm.weight"))[0]  # [T, D]
        routing = gate(Tensor(y))
    used = np.unique(routing.topk_idx)
    out = _expert(shards, "mlp.shared_experts.", y)
    for e in used.tolist():
        token, slot = np.nonzero(routing.topk_idx == e)
        out[token] += routing.topk_weight.data[token, slot][:, None] * _expert(shards, f"mlp.experts.{e}.", y[token])
    result = x[0] + out
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rms, read = np.sqrt((result**2).mean()), shards.bytes_read / 1e9
    print(f"{tokens} tokens, {len(used)} of {cfg.n_routed_experts} experts read, {read:.2f} GB of shards")
    print(f"{time.perf_counter() - start:.1f} s, peak memory {peak / 1e9:.2f} GB, output rms {rms:.3f}")


def _expert(shards: Shards, prefix: str, rows: np.ndarray) -> np.ndarray:
    gate, up = (rows @ shards.read(f"{prefix}{name}_proj.weight").T for name in ("gate", "up"))
    return (sigmoid(gate) * gate * up) @ shards.read(f"{prefix}down_proj.weight").T


def _norm(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * w


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=8)
    given = parser.parse_args()
    make(given.folder) if given.what == "make" else run(given.folder, given.tokens)
