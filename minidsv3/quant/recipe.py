"""Precision recipes: which part of the model uses which arithmetic, one table each.

    fp32                 everything in float32
    bf16                 every linear layer in BF16 with FP32 sums: what the report compares with
    fp8                  the report's recipe (sections 3.3.1 to 3.3.3)
    fp8-tensorwise       one scale a tensor, E4M3 forwards, E5M2 for gradients
    fp8-blockwise-dgrad  fp8 with 128x128 blocks for the gradients of activations too (appendix B.2: diverges at 16B)
    mxfp8                E4M3 in blocks of 32 with power-of-two scales

In every low-precision recipe the embedding, the gate, the norms and the core of the attention stay in float32, and the
head is BF16; master weights and gradients are float32, and `fp8` stores the moments of AdamW in BF16. Rows of `fp8`
that stand apart: the input of `o_proj` is kept in E5M6 with power-of-two scales (it is quantised in both directions,
and attention's backward is sensitive to it); the experts' up projection has power-of-two scales for its input, which
arrived over the network, and their down projection for its gradient; SwiGLU's input is kept in FP8 and its output
computed again.

A recipe may be changed row by row: "fp8:lm_head=fp8,moments=fp32" is `fp8` with the head in FP8 and FP32 moments.

Simplified: the residual stream stays float32 (BF16 in the report), and so do the saved inputs of norms and attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .comparison import MXGemm, TensorwiseGemm
from .formats import E5M6
from .gemm import ACCUMULATE, BF16Gemm, FP8Gemm, FP8Store, fake_quantized

LINEAR = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_up", "down_proj",
    "experts.gate_up", "experts.down_proj", "eh_proj",
)  # fmt: skip
ROWS = (*LINEAR, "lm_head", "gate", "embed_tokens", "attention", "swiglu", "moments")

# name of an arithmetic -> the gemm that computes it, given whether the accumulator is the exact one
GEMMS: dict[str, Callable[[bool], Any]] = {
    "fp32": lambda exact: None,  # the model's own
    "bf16": lambda exact: BF16Gemm(),
    "fp8": lambda exact: FP8Gemm(exact=exact),
    "fp8, E5M6 kept": lambda exact: FP8Gemm(exact=exact, kept=E5M6),
    "fp8, x by 2^n": lambda exact: FP8Gemm(exact=exact, x_scale="ue8m0"),
    "fp8, dy by 2^n": lambda exact: FP8Gemm(exact=exact, dy_scale="ue8m0"),
    "fp8, dy in blocks": lambda exact: FP8Gemm(exact=exact, dy_rows=128),
    "fp8-tensorwise": lambda exact: TensorwiseGemm(exact=exact),
    "mxfp8": lambda exact: MXGemm(),
}

_HIGH = {"lm_head": "bf16", "gate": "fp32", "embed_tokens": "fp32", "attention": "fp32"}
_FP8 = {
    **dict.fromkeys(LINEAR, "fp8"),
    "o_proj": "fp8, E5M6 kept",
    "experts.gate_up": "fp8, x by 2^n",
    "experts.down_proj": "fp8, dy by 2^n",
    **_HIGH,
    "swiglu": "fp8",
    "moments": "bf16",
}
RECIPES: dict[str, dict[str, str]] = {
    "fp32": dict.fromkeys(ROWS, "fp32"),
    "bf16": {**dict.fromkeys(LINEAR, "bf16"), **_HIGH, "swiglu": "fp32", "moments": "fp32"},
    "fp8": _FP8,
    "fp8-tensorwise": {**dict.fromkeys(LINEAR, "fp8-tensorwise"), **_HIGH, "swiglu": "fp32", "moments": "fp32"},
    "fp8-blockwise-dgrad": {**_FP8, **dict.fromkeys(LINEAR, "fp8, dy in blocks")},
    "mxfp8": {**dict.fromkeys(LINEAR, "mxfp8"), **_HIGH, "swiglu": "fp32", "moments": "fp32"},
}


@dataclass(frozen=True)
class Recipe:
    """What the model asks for when it is built, by the last part of a layer's name.

    Attributes
    ----------
    name : str
        As `recipe_for` takes it.
    rows : dict of row to arithmetic
    exact : bool
        FP8 products on the emulated tensor core.
    """

    name: str
    rows: dict[str, str]
    exact: bool = False
    _gemms: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def gemm(self, layer: str) -> Any:
        """The gemm of a layer; None for the model's own float32 one."""
        arithmetic = self.rows[layer]
        if arithmetic not in self._gemms:
            self._gemms[arithmetic] = GEMMS[arithmetic](self.exact)
        return self._gemms[arithmetic]

    def rounding(self, place: str) -> Callable[[np.ndarray], np.ndarray] | None:
        """What rounds the inputs of 'attention' or the rows of 'embed_tokens'; None for nothing."""
        return fake_quantized if self.rows[place] == "fp8" else None

    def store(self, op: str) -> FP8Store | None:
        """Where 'swiglu' keeps its input; None for as it is."""
        return FP8Store() if self.rows[op] == "fp8" else None

    @property
    def moments_dtype(self) -> str:
        """For `TrainConfig.moments_dtype`."""
        return "bfloat16" if self.rows["moments"] == "bf16" else "float32"

    def table(self) -> str:
        """One line a row."""
        return "\n".join(f"{row:20} {self.rows[row]}" for row in ROWS)


def recipe_for(precision: str, accumulate: str = "fast") -> Recipe | None:
    """The recipe of a name, changes behind a colon included; None for plain fp32.

    Raises
    ------
    ValueError
        An unknown name, row or arithmetic; or an exact accumulator where the recipe has no Hopper FP8 product.
    """
    name, _, changes = precision.partition(":")
    if name not in RECIPES:
        raise ValueError(f"precision={name!r} is not one of {', '.join(RECIPES)}")
    if accumulate not in ACCUMULATE:
        raise ValueError(f"accumulate={accumulate!r} is not one of {', '.join(ACCUMULATE)}")
    rows = dict(RECIPES[name])
    for change in changes.split(",") if changes else ():
        row, _, arithmetic = change.partition("=")
        if row not in ROWS:
            raise ValueError(f"precision={precision!r}: {row!r} is not one of the rows {', '.join(ROWS)}")
        allowed = _allowed(row)
        if arithmetic not in allowed:
            raise ValueError(f"precision={precision!r}: {row}={arithmetic!r} is not one of {', '.join(allowed)}")
        rows[row] = arithmetic
    if accumulate == "exact" and not any(rows[row].startswith("fp8") for row in (*LINEAR, "lm_head", "gate")):
        raise ValueError(
            f"accumulate='exact' is the Hopper FP8 tensor core, which precision={precision!r} does not use"
        )
    return None if precision == "fp32" else Recipe(precision, rows, accumulate == "exact")


def _allowed(row: str) -> tuple[str, ...]:
    if row == "moments":
        return ("fp32", "bf16")
    return (
        ("fp32", "fp8") if row in ("embed_tokens", "attention", "swiglu") else tuple(a for a in GEMMS if "," not in a)
    )
