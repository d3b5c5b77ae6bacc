"""The latent cache: what a decoder remembers of each token, ``kv_lora_rank + qk_rope_head_dim`` numbers a layer.

For each layer and token it keeps c_kv after its norm and k_rope after its rotation, nothing else: 576 numbers in
DeepSeek-V3, 70,272 bytes over 61 layers in BF16. Storage grows by pages, so nothing that is stored is ever copied.
Sequences of a batch may have different lengths, and a sequence can be cut back (`truncate`), which is how speculative
decoding takes rejected tokens out again.

Storage in BF16 is the released model's own. E4M3 with one scale a token is an experiment: half the bytes, and an error
that the lessons measure.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import Array
from ..config import ModelConfig
from ..ops.latent import Attend, absorbed_attention
from ..quant.formats import BF16, E4M3, E4M3_MAX, to_e4m3

PAGE = 128  # tokens


class LayerCache:
    """One layer's pages; what `MLA` is handed."""

    def __init__(self, owner: LatentCache) -> None:
        self._owner = owner
        self.pages: list[Array] = []  # [B, PAGE, r_kv + d_r] in the storage dtype
        self.scales: list[Array] = []  # E4M3 only: float32 [B, PAGE, 1]

    def append(self, c_kv: Array, k_rope: Array) -> None:
        """Store the new tokens [B, S, r_kv], [B, S, d_r] behind each sequence's end."""
        entry = np.concatenate([c_kv, k_rope], axis=-1)
        if self._owner.dtype == E4M3:
            scale = np.maximum(np.abs(entry).max(axis=-1, keepdims=True), 1e-4) / np.float32(E4M3_MAX)
            self._write(self.scales, scale, np.dtype(np.float32), 1)
            entry = to_e4m3(entry / scale)
        self._write(self.pages, entry, self._owner.dtype, entry.shape[-1])

    def attend(self, q: Array, w: Array, scale: float) -> Array:
        """Attention of the new tokens' queries [B, S, H, d] over everything stored (`ops.latent.Attend`)."""
        owner = self._owner
        stop, used = int(owner.lengths.max()) + q.shape[1], []
        for i in range(-(-stop // owner.page)):
            page = self.pages[i][:, : stop - i * owner.page]
            if page.dtype != q.dtype:
                page = page.astype(q.dtype)
            used.append(page * self.scales[i][:, : page.shape[1]] if self.scales else page)
        return owner.attention(q, used, owner.lengths, w, scale)

    def put(self, b: int, at: int, entry: Array) -> Array:
        """Store one token of sequence `b`, entry [r_kv + d_r] at position `at`; returns all up to it, [at + 1, ...].

        What is returned is a view of the page, or a copy where there are several. Not for E4M3, which has scales.
        """
        page, offset = divmod(at, self._owner.page)
        while len(self.pages) <= page:
            self._grow(self.pages, self._owner.dtype, self._owner.width)
        here = self.pages[page][b]
        here[offset] = entry
        if page == 0:
            return here[: at + 1]
        return np.concatenate([*(before[b] for before in self.pages[:page]), here[: offset + 1]])

    def _grow(self, pages: list[Array], dtype: np.dtype, width: int) -> None:
        shape = (len(self._owner.lengths), self._owner.page, width)
        pages.append(np.zeros(shape, dtype=dtype))  # zeros: what is masked must still be finite

    def _write(self, pages: list[Array], entry: Array, dtype: np.dtype, width: int) -> None:
        B, S = entry.shape[:2]
        lengths, size = self._owner.lengths, self._owner.page
        while len(pages) * size < int(lengths.max()) + S:
            self._grow(pages, dtype, width)
        groups = [slice(None)] if (lengths == lengths[0]).all() else [slice(b, b + 1) for b in range(B)]
        for rows in groups:  # all sequences at once where they are equally long
            done, at = 0, int(lengths[rows][0])
            while done < S:
                page, offset = divmod(at + done, size)
                n = min(S - done, size - offset)
                pages[page][rows, offset : offset + n] = entry[rows, done : done + n]
                done += n


class LatentCache:
    """A cache for `batch` sequences.

    Parameters
    ----------
    config : ModelConfig
    batch : int
    dtype : float32 (default), float64, bfloat16 or float8_e4m3fn
        Storage; attention computes in the model's dtype.
    layers : int, optional
        Layers to keep, by default ``num_hidden_layers`` (an MTP module has a cache of its own).
    page : int
        Tokens that a layer makes room for at once, and that lie in one array.
    attention : function
        `ops.latent.absorbed_attention` or `recomputed_attention`.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        dtype: Any = np.float32,
        *,
        layers: int | None = None,
        page: int = PAGE,
        attention: Attend = absorbed_attention,
    ) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float32), np.dtype(np.float64), BF16, E4M3):
            raise ValueError(f"dtype={self.dtype} is not float32, float64, bfloat16 or float8_e4m3fn")
        if batch < 1:
            raise ValueError(f"batch={batch} is not positive")
        if page < 1:
            raise ValueError(f"page={page} is not positive")
        self.config, self.attention, self.page = config, attention, page
        self.width = config.kv_lora_rank + config.qk_rope_head_dim  # numbers of a token in a layer
        self.lengths = np.zeros(batch, dtype=np.int64)  # tokens stored of each sequence
        self.layers = [LayerCache(self) for _ in range(config.num_hidden_layers if layers is None else layers)]

    def positions(self, S: int) -> Array:
        """Positions of S new tokens, int64 [B, S], or [S] where all sequences are equally long."""
        span = np.arange(S, dtype=np.int64)
        if (self.lengths == self.lengths[0]).all():
            return self.lengths[0] + span
        return self.lengths[:, None] + span

    def extend(self, counts: int | Array) -> None:
        """Count new tokens as stored, after all layers have appended them; `counts` int or [B] (rest was padding)."""
        self.lengths = self.lengths + counts

    def truncate(self, lengths: int | Array) -> None:
        """Forget everything behind `lengths` (int or [B]): what comes next overwrites it.

        Raises ValueError if a sequence is shorter than that.
        """
        lengths = np.broadcast_to(np.asarray(lengths, dtype=np.int64), self.lengths.shape)
        if (lengths < 0).any() or (lengths > self.lengths).any():
            raise ValueError(f"can't cut sequences of {self.lengths.tolist()} tokens to {lengths.tolist()}")
        self.lengths = lengths.copy()

    @property
    def numbers_per_token(self) -> int:
        """Numbers kept of each token, over all layers."""
        return len(self.layers) * self.width

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token takes, read off the stored arrays (0 before the first token)."""
        total = 0.0
        for layer in self.layers:
            arrays = [*layer.pages[:1], *layer.scales[:1]]
            total += sum(a.nbytes / (a.shape[0] * a.shape[1]) for a in arrays)
        return total

    @property
    def nbytes(self) -> int:
        """Bytes held by the pages."""
        return sum(a.nbytes for layer in self.layers for a in (*layer.pages, *layer.scales))
