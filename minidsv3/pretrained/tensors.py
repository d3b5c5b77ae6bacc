"""safetensors files: mapped when read, streamed when written.

A file is eight bytes (the header's length), a JSON header (name -> dtype, shape, byte range) and the numbers. The
safetensors library checks a file on opening: length of the header, its JSON, byte ranges that overlap, leave holes or
exceed the file. Its NumPy side cannot hand out FP8, so the bytes are taken from a map of the file, by the offsets that
the library has just accepted: opening a large shard reads its header only, and a tensor is read when it is used.

Written files hold one tensor in memory at a time, which the library's own writer does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..quant.formats import BF16, E4M3, UE8M0

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BF16,
    "F8_E4M3": E4M3,
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": UE8M0,
}
MAX_AXES = 32  # fewer than NumPy can hold, and 30 more than any weight has
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile:
    """A safetensors file, open and mapped; `names` are its tensors.

    Raises ValueError, naming the file, if it is missing, damaged or cut short, or holds anything but floats.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():  # nor a folder, nor a pipe that would never end
                raise FileNotFoundError("no such file")
            with safe_open(path, framework="np"):  # all checks of the header happen here
                pass
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
        except OSError as error:
            raise ValueError(f"{path} is missing or can't be read: {error.strerror or error}") from None
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from None
        header.pop("__metadata__", None)
        self._entries: dict[str, dict] = header
        self._start = 8 + length
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{path}: tensor {name!r} is {entry['dtype']}, not one of {', '.join(DTYPES)}")
            if len(entry["shape"]) > MAX_AXES:
                raise ValueError(f"{path}: tensor {name!r} has {len(entry['shape'])} axes, at most {MAX_AXES} are read")
        self._map = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size > self._start else None

    @property
    def names(self) -> list[str]:
        """Tensors in the order of the header."""
        return list(self._entries)

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of a tensor."""
        return DTYPES[self._entries[name]["dtype"]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._entries[name]["shape"])

    def array(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file; nothing is read before it is used."""
        a, b = self._entries[name]["data_offsets"]
        if self._map is None or a == b:
            return np.zeros(self.shape(name), dtype=self.dtype(name))
        return np.asarray(self._map[self._start + a : self._start + b]).view(self.dtype(name)).reshape(self.shape(name))


class Planned(NamedTuple):
    """A tensor to write: its final dtype and shape are known before its numbers are."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * int(np.prod(self.shape))


def planned(arrays: dict[str, np.ndarray]) -> list[Planned]:
    """Arrays that are written as they are."""
    return [Planned(name, a.dtype, a.shape, lambda a=a: a) for name, a in arrays.items()]  # type: ignore[misc]


def write_tensors(tensors: Iterable[Planned], path: Path, report: Callable[[int], object] | None = None) -> None:
    """Write a safetensors file, one tensor in memory at a time, to a temporary name that is renamed when complete.

    `report`, if given, is called with the bytes of each tensor once it is written.

    The same tensors give the same bytes. Wider dtypes come first, so that every tensor is aligned.
    """
    ordered = sorted(tensors, key=lambda t: -t.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # what the released files say
    offset = 0
    for t in ordered:
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": t.shape, "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for t in ordered:
                array = t.make()
                assert (array.dtype, array.shape) == (t.dtype, t.shape), t.name
                stream.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
                if report:
                    report(t.nbytes)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
