"""Text to token ids and back: bytes by default, a released tokenizer.json as an extra.

`ByteTokenizer` needs no training, covers every file, and makes loss comparable at sight: one id is one byte, so the
loss divided by ln 2 is bits per byte. Id 256 is the document boundary: it stands before each document, is what a text
without a prompt begins with, and never turns back into bytes.

`load_tokenizer` reads a Hugging Face ``tokenizer.json`` (such as DeepSeek-V3's, 128K entries) through the `tokenizers`
package, for work with released checkpoints; it is imported only then.

What is simplified against the report (section 4.1): a byte vocabulary instead of byte-level BPE with 128K entries, so
a sequence of 128 tokens is a line and a half, not a page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# What document boundaries are called in released files; the first that the vocabulary has is taken.
_BOUNDARY_NAMES = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<|endoftext|>", "</s>")  # noqa: RUF001


class Tokenizer(Protocol):
    """What loader and generation ask of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def boundary(self) -> int: ...
    def encode(self, text: str | bytes) -> np.ndarray: ...
    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes: ...
    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class ByteTokenizer:
    """One id per byte, and `boundary` = 256 between documents."""

    vocab_size = 257
    boundary = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a text's UTF-8 bytes, or of raw bytes.

        Returns
        -------
        ndarray, int64, shape [number of bytes]
        """
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that `ids` stand for, boundaries left out.

        Raises
        ------
        ValueError
            An id is outside [0, 257), or not an integer.
        """
        ids = _check_ids(ids, self.vocab_size)
        return ids[ids != self.boundary].astype(np.uint8).tobytes()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """`decode_bytes` as text; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a Hugging Face ``tokenizer.json``.

    Parameters
    ----------
    path : str or Path
        The file, or a checkpoint folder that holds it.

    Raises
    ------
    ValueError
        The `tokenizers` package is not installed, the file is missing or damaged, or it names no document boundary.
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError("tokenizer.json needs the tokenizers package: pip install 'minidsv3[tokenizers]'") from None
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
    return _ReleasedTokenizer(inner, path)


class _ReleasedTokenizer:
    """A `tokenizers.Tokenizer` under our method names."""

    def __init__(self, inner: Any, path: Path) -> None:
        found = [inner.token_to_id(name) for name in _BOUNDARY_NAMES if inner.token_to_id(name) is not None]
        if not found:
            raise ValueError(f"{path} has none of the boundary tokens {', '.join(_BOUNDARY_NAMES)}")
        self._inner = inner
        self.boundary: int = found[0]
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str | bytes) -> np.ndarray:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.decode(ids).encode("utf-8")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = _check_ids(ids, self.vocab_size)
        return self._inner.decode(ids[ids != self.boundary].tolist(), skip_special_tokens=False)


def _check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids have dtype {ids.dtype}, not an integer one")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"id {low if low < 0 else high} is outside [0, {vocab_size})")
    return ids
