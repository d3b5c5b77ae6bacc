"""What the machines can do: GPUs, network cards and fabrics, in SI units, with the source of every number.

All rates are peaks in one direction, dense (without sparsity), per GPU; what kernels reach of them is in `clock`.
Bytes and FLOPs are plain numbers, k, M, G, T, P powers of ten.

A machine of your own comes from a JSON file (`read_cluster`), in which every field carries its unit:

    {"base": "h800",                                   a name of `CLUSTERS`, for what is not said
     "name": "my cluster",
     "gpu": {"bf16_flops_per_second": "989 TFLOP/s", "fp8_flops_per_second": "1979 TFLOP/s", "memory_bytes": "80 GB",
             "memory_bytes_per_second": "3.35 TB/s", "nvlink_bytes_per_second": "200 GB/s", "sms": "132 SM"},
     "nic": {"bytes_per_second": "400 Gb/s", "planes": "1 plane"},
     "gpus_per_node": "8 GPU",                         GPUs that reach each other over NVLink
     "usd_per_gpu_hour": "2 USD/h"}

Bits are ``b`` and bytes ``B``: ``400 Gb/s`` is 50 GB/s.

Sources: I1 = Insights into DeepSeek-V3 (ISCA 2025, arXiv:2505.09343); T1 = DeepSeek-V3 technical report
(arXiv:2412.19437); NVIDIA's data sheets of A100, H100, H200, GB200 NVL72 and ConnectX.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _unit(unit: str) -> Any:
    return field(metadata={"unit": unit})


@dataclass(frozen=True)
class GPU:
    """One GPU; `sources` says for every number where it is from."""

    name: str
    bf16_flops_per_second: float = _unit("FLOP/s")
    fp8_flops_per_second: float = _unit("FLOP/s")  # where there is no FP8 unit: that of BF16
    memory_bytes: float = _unit("B")
    memory_bytes_per_second: float = _unit("B/s")
    nvlink_bytes_per_second: float = _unit("B/s")
    sms: float = _unit("SM")
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NIC:
    """One network card; each GPU has its own. `planes`: independent networks that one card can spray over."""

    name: str
    bytes_per_second: float = _unit("B/s")
    planes: float = _unit("plane")
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fabric:
    """How long 64 bytes take: ``end_seconds + switch_seconds * switches on the path``; and the ports of a switch."""

    name: str
    end_seconds: float = _unit("s")
    switch_seconds: float = _unit("s")
    ports: float = _unit("port")
    sources: Mapping[str, str] = field(default_factory=dict)

    def latency(self, switches: int) -> float:
        """Seconds from CPU to CPU over `switches` switches."""
        return self.end_seconds + self.switch_seconds * switches


@dataclass(frozen=True)
class Cluster:
    """GPUs, how many of them share NVLink, the card beside each, and a price."""

    name: str
    gpu: GPU
    nic: NIC
    gpus_per_node: float = _unit("GPU")
    usd_per_gpu_hour: float = _unit("USD/h")
    sources: Mapping[str, str] = field(default_factory=dict)


def _hopper(name: str, memory: float, bandwidth: float, nvlink: float, **sources: str) -> GPU:
    sheet = {
        "bf16_flops_per_second": "NVIDIA H100 data sheet, SXM: 1,979 TFLOPS with sparsity, halved; I1 uses 989",
        "fp8_flops_per_second": "NVIDIA H100 data sheet, SXM: 3,958 TFLOPS with sparsity, halved",
        "memory_bytes": "NVIDIA data sheet, SXM",
        "memory_bytes_per_second": "NVIDIA data sheet, SXM",
        "nvlink_bytes_per_second": "NVIDIA data sheet, SXM: 900 GB/s in both directions",
        "sms": "T1, section 3.2.2: 132",
    }
    return GPU(name, 989e12, 1979e12, memory, bandwidth, nvlink, 132, {**sheet, **sources})


A100 = GPU(
    "A100", 312e12, 312e12, 80e9, 2.039e12, 300e9, 108,
    dict.fromkeys(
        ["bf16_flops_per_second", "memory_bytes", "memory_bytes_per_second", "nvlink_bytes_per_second", "sms"],
        "NVIDIA A100 80GB data sheet, SXM (NVLink 600 GB/s in both directions)",
    ) | {"fp8_flops_per_second": "no FP8 unit: the BF16 rate"},
)  # fmt: skip
H100 = _hopper("H100", 80e9, 3.35e12, 450e9)
H200 = _hopper("H200", 141e9, 4.8e12, 450e9)
H800 = _hopper("H800", 80e9, 3.35e12, 200e9, nvlink_bytes_per_second="I1, section 4.1: 400 GB/s in both directions")
GB200 = GPU(
    "GB200", 2.5e15, 5e15, 186e9, 8e12, 900e9, 148,
    {
        "bf16_flops_per_second": "NVIDIA GB200 NVL72 data sheet: 360 PFLOPS with sparsity for 72 GPUs, / 144",
        "fp8_flops_per_second": "NVIDIA GB200 NVL72 data sheet: 720 PFLOPS with sparsity for 72 GPUs, / 144",
        "memory_bytes": "NVIDIA GB200 NVL72 data sheet: 13.4 TB for 72 GPUs",
        "memory_bytes_per_second": "NVIDIA GB200 NVL72 data sheet: 576 TB/s for 72 GPUs",
        "nvlink_bytes_per_second": "I1, section 2.3.2: 900 GB/s in one direction",
        "sms": "from memory, not checked: 148",
    },
)  # fmt: skip
CX7 = NIC("ConnectX-7", 50e9, 1, {
    "bytes_per_second": "I1, section 4: 400 Gb/s InfiniBand",
    "planes": "I1, section 5.1.1: one port, one plane",
})  # fmt: skip
CX8 = NIC("ConnectX-8", 100e9, 4, {
    "bytes_per_second": "NVIDIA ConnectX-8 data sheet: 800 Gb/s",
    "planes": "I1, section 5.1.1: four planes",
})  # fmt: skip

# I1, Table 5: 64 bytes from CPU to CPU over 1 switch (same leaf) and 3 switches (cross leaf): two values, two constants
INFINIBAND = Fabric("InfiniBand", 2.35e-6, 0.45e-6, 64, {
    "end_seconds": "I1, Table 5: 2.8 and 3.7 us", "switch_seconds": "I1, Table 5: 2.8 and 3.7 us",
    "ports": "I1, section 5.2.2: 64 ports of 400G",
})  # fmt: skip
ROCE = Fabric("RoCE", 2.6e-6, 1.0e-6, 128, {
    "end_seconds": "I1, Table 5: 3.6 and 5.6 us", "switch_seconds": "I1, Table 5: 3.6 and 5.6 us",
    "ports": "I1, section 5.2.2: 128 ports",
})  # fmt: skip
NVLINK = Fabric("NVLink", 3.33e-6, 0.0, 64, {
    "end_seconds": "I1, Table 5: 3.33 us inside a node",
    "switch_seconds": "inside a node only: no second value to tell it apart",
    "ports": "NVIDIA NVSwitch of the third generation: 64 ports",
})  # fmt: skip

_PRICE = {"usd_per_gpu_hour": "T1, Table 1: the price the report assumes for an H800"}
_EIGHT = {"gpus_per_node": "I1, section 4.1: 8"}
CLUSTERS = {
    "h800": Cluster("2,048 H800", H800, CX7, 8, 2.0, _PRICE | _EIGHT),
    "h100": Cluster("H100 with ConnectX-7", H100, CX7, 8, 2.0, _PRICE | _EIGHT),
    "h200": Cluster("H200 with ConnectX-7", H200, CX7, 8, 2.0, _PRICE | _EIGHT),
    "gb200-nvl72": Cluster("GB200 NVL72", GB200, CX7, 72, 2.0, _PRICE | {
        "gpus_per_node": "I1, section 2.3.2: 72 GPUs share NVLink"}),
}  # fmt: skip
GPUS = {gpu.name.lower(): gpu for gpu in (A100, H100, H200, H800, GB200)}
FABRICS = {fabric.name.lower(): fabric for fabric in (INFINIBAND, ROCE, NVLINK)}

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "u": 1e-6, "m": 1e-3, "n": 1e-9,
             "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}  # fmt: skip


def quantity(text: Any, unit: str) -> float:
    """The number of `text` in `unit`: ``quantity("400 Gb/s", "B/s") == 50e9``.

    Raises ValueError without a unit, with another one, or for a number that is not positive and finite.
    """
    found = re.fullmatch(r"\s*([-+0-9.eE_]+)\s*([A-Za-z/]+)\s*", text) if isinstance(text, str) else None
    for name, factor in ((unit, 1.0), *((("b" + unit[1:], 1 / 8),) if unit.startswith("B") else ())):
        if found and found[2].endswith(name) and found[2].removesuffix(name) in _PREFIXES:
            try:
                value = float(found[1]) * factor * _PREFIXES[found[2].removesuffix(name)]
            except ValueError:
                break
            if 0 < value < math.inf:
                return value
    raise ValueError(f"{text!r} is not a positive number with unit, like '1 {unit}' or '2.5 k{unit}'")


def read_cluster(path: str | Path) -> Cluster:
    """A cluster from a JSON file of the form in this module's docstring.

    Raises ValueError naming the field for unknown fields, missing ones and missing or wrong units.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object with fields")
    base_name = content.pop("base", "h800")
    if base_name not in CLUSTERS:
        raise ValueError(f"{path}: base={base_name!r} is not one of {', '.join(CLUSTERS)}")
    base = CLUSTERS[base_name]
    changes: dict[str, Any] = {}
    for part in ("gpu", "nic"):
        if part in content:
            changes[part] = _changed(getattr(base, part), content.pop(part), f"{path}: {part}", path)
    return dataclasses.replace(_changed(base, content, str(path), path), **changes)


def _changed(base: Any, fields: Any, where: str, path: str | Path) -> Any:
    """A copy of `base` with the fields of the file, whose source is the file."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where} holds no object with fields")
    units = {f.name: f.metadata["unit"] for f in dataclasses.fields(base) if "unit" in f.metadata}
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "name":
            changes[name] = str(value)
            continue
        if name not in units:
            raise ValueError(f"{where}: unknown field {name!r}; there are name, {', '.join(units)}")
        try:
            changes[name] = quantity(value, units[name])
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from None
    sources = {**base.sources, **dict.fromkeys(changes.keys() - {"name"}, str(path))}
    return dataclasses.replace(base, **changes, sources=sources)
