"""Ask a real Hopper GPU: run its FP8 tensor core on chosen inputs and compare every bit with the emulator.

    python tests/hardware/probe_hopper.py --out hopper_probe [--tiles 2000]        (PyTorch with CUDA, an sm_90 GPU)

NOT RUN YET: no Hopper GPU was at hand when this was written; it is checked for syntax and its host side is tested with
the emulator in the GPU's place (`--dry-run`). What it does:

1. `wgmma` called directly (one warpgroup, one 64x8 tile a block, operands in shared memory without swizzle): random and
   adversarial tiles, a chain over K, C = 0 and C of any bits. 2,000 tiles of 64x8 are 1,024,000 outputs a case.
2. The open points, one line each: C with low bits, C with zero products, -0, infinity, NaN, FLT_MAX, subnormal C, C
below
   2^-105 with zero operands.
3. `torch._scaled_mm`, with and without fast accumulation, against one chain and against promotion every 32 to 512.

Written to OUT.npz (inputs and outputs as bits) and OUT.json (machine, driver, versions, mismatches, SHA-256), so that
they can become golden vectors. Traps: `mma.sync` FP8 on Hopper is another unit, and cuBLAS may split K; kernel names
are noted.
"""

import argparse
import hashlib
import json
import platform
import sys
from pathlib import Path

import numpy as np

from minidsv3.quant.formats import E4M3
from minidsv3.quant.tensorcore import tensorcore_matmul

M, N, STEP = 64, 8, 32  # of one wgmma
INTERVALS = (None, 32, 64, 128, 256, 512)

SOURCE = r"""
extern "C" __global__ void wgmma_chain(const unsigned char* a, const unsigned char* b, const float* c, float* d, int K,
                                       int use_c) {
    // Core matrices of 8 rows x 16 bytes; along K the next one is 128 bytes on, 8 rows further 256 bytes on.
    __shared__ __align__(128) unsigned char sa[64 * 32]; __shared__ __align__(128) unsigned char sb[8 * 32]; const int
    t = threadIdx.x, tile = blockIdx.x; const int row = 16 * (t / 32) + (t % 32) / 4, col = 2 * (t % 4); a += (long
    long)tile * 64 * K; b += (long long)tile * 8 * K; c += tile * 512; d += tile * 512; float r0 = c[row * 8 + col], r1
    = c[row * 8 + col + 1], r2 = c[(row + 8) * 8 + col], r3 = c[(row + 8) * 8 + col + 1]; unsigned int pa = (unsigned
    int)__cvta_generic_to_shared(sa), pb = (unsigned int)__cvta_generic_to_shared(sb); const unsigned long long strides
    = (128ull >> 4) << 16 | (256ull >> 4) << 32; const unsigned long long da = (pa >> 4 & 0x3FFF) | strides, db = (pb
    >> 4 & 0x3FFF) | strides; for (int k = 0; k < K; k += 32) {
        for (int i = t; i < 64 * 32; i += 128) {
            int m = i / 32, x = i % 32;
            sa[(m / 8) * 256 + (x / 16) * 128 + (m % 8) * 16 + x % 16] = a[(long long)m * K + k + x];
        }
        for (int i = t; i < 8 * 32; i += 128) {
            int n = i / 32, x = i % 32;
            sb[(x / 16) * 128 + n * 16 + x % 16] = b[(long long)n * K + k + x];
        }
        asm volatile("fence.proxy.async;" ::: "memory");
        __syncthreads();
        int scale_d = k > 0 || use_c;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %6, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, p, 1, 1; }"
                     : "+f"(r0), "+f"(r1), "+f"(r2), "+f"(r3) : "l"(da), "l"(db), "r"(scale_d));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        __syncthreads();
    }
    d[row * 8 + col] = r0; d[row * 8 + col + 1] = r1; d[(row + 8) * 8 + col] = r2; d[(row + 8) * 8 + col + 1] = r3;
}
"""


def tiles(kind: str, count: int, K: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 bytes a [count, 64, K] and b [count, 8, K] of one kind."""
    shapes = ((count, M, K), (count, N, K))
    if kind == "bits":  # every finite code equally likely
        a, b = (rng.integers(0, 254, s, dtype=np.uint8) for s in shapes)
        return tuple(np.where(x >= 0x7F, x + 1, x).astype(np.uint8) for x in (a, b))  # type: ignore[return-value]
    scale = {"normal": 100.0, "small": 2.0**-7, "largest": 1e4, "zero": 0.0}.get(kind, 8.0)
    a, b = ((rng.standard_normal(s) * scale).clip(-448, 448).astype(np.float32).astype(E4M3) for s in shapes)
    if kind == "cancel":
        a[..., K // 2 :], b[..., K // 2 :] = -a[..., : K - K // 2], b[..., : K - K // 2]
    if kind == "border":  # one product far above the others, which are then cut at their last bits
        a[..., 0], b[..., 0] = 256, 256
    return a.view(np.uint8), b.view(np.uint8)


def accumulators(kind: str, count: int, rng: np.random.Generator) -> np.ndarray | None:
    """float32 C [count, 64, 8] of one kind; None for C = 0."""
    shape = (count, M, N)
    if kind == "none":
        return None
    if kind == "special":
        values = [-0.0, np.inf, -np.inf, np.nan, np.finfo(np.float32).max, 1e-40, 2.0**-110, 1.2345678, -(2.0**-126)]
        return rng.choice(np.array(values, dtype=np.float32), shape)
    if kind == "any":
        return np.exp2(rng.uniform(-40, 30, shape)).astype(np.float32) * rng.choice(np.float32([-1, 1]), shape)
    return (rng.standard_normal(shape) * 1e4).astype(np.float32)


CASES = [  # tiles, accumulator, K
    ("normal", "none", 32), ("bits", "none", 32), ("border", "none", 32), ("cancel", "none", 32),
    ("largest", "none", 32),
    ("normal", "normal", 32), ("bits", "any", 32), ("small", "any", 32), ("border", "normal", 32), ("zero", "any", 32),
    ("zero", "special", 32), ("normal", "special", 32), ("normal", "none", 128), ("bits", "none", 512),
    ("normal", "any", 512),
]  # fmt: skip


def emulated(a: np.ndarray, b: np.ndarray, c: np.ndarray | None) -> np.ndarray:
    """The emulator's d [count, 64, 8]."""
    return np.stack(
        [
            tensorcore_matmul(x.view(E4M3), y.view(E4M3), None if c is None else c[i])
            for i, (x, y) in enumerate(zip(a, b))
        ]
    )


def on_gpu(a: np.ndarray, b: np.ndarray, c: np.ndarray | None) -> np.ndarray:
    """The GPU's d [count, 64, 8]."""
    import torch

    kernel = torch.cuda._compile_kernel(SOURCE, "wgmma_chain", compute_capability="90a")
    x, y = torch.from_numpy(a).cuda(), torch.from_numpy(b).cuda()
    z = torch.from_numpy(np.zeros((len(a), M, N), dtype=np.float32) if c is None else c).cuda()
    d = torch.empty((len(a), M, N), dtype=torch.float32, device="cuda")
    kernel((len(a), 1, 1), (128, 1, 1), (x, y, z, d, a.shape[2], int(c is not None)))
    torch.cuda.synchronize()
    return d.cpu().numpy()


def scaled_mm(results: dict, arrays: dict) -> None:
    """`torch._scaled_mm` with unit scales: which rule explains its bits."""
    import torch

    rng, one = np.random.default_rng(1), torch.ones((), device="cuda")
    for m, n, K in ((64, 64, 32), (64, 64, 128), (128, 128, 256), (256, 256, 512), (256, 256, 4096)):
        a, b = ((rng.standard_normal((s, K)) * 8).astype(np.float32).astype(E4M3) for s in (m, n))
        x, y = (torch.from_numpy(v.view(np.uint8)).cuda().view(torch.float8_e4m3fn) for v in (a, b))
        for fast in (True, False):
            with torch.profiler.profile() as profile:
                d = torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast).cpu().numpy()
            name = f"scaled_mm_{m}x{n}x{K}_{'fast' if fast else 'precise'}"
            wrong = {
                str(p): int(
                    np.count_nonzero(tensorcore_matmul(a, b, promote_every=p).view(np.uint32) != d.view(np.uint32))
                )
                for p in INTERVALS
            }
            kernels = sorted(
                {event.key for event in profile.key_averages() if "gemm" in event.key or "nvjet" in event.key}
            )
            results[name] = {"of": d.size, "mismatches by promotion interval": wrong, "kernels": kernels}
            arrays |= {f"{name}.a": a.view(np.uint8), f"{name}.b": b.view(np.uint8), f"{name}.d": d.view(np.uint32)}


def machine(dry_run: bool) -> dict:
    """What the bits may depend on."""
    if dry_run:
        return {"gpu": "none: the emulator against itself", "platform": platform.platform()}
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("no sm_90 GPU here: this probe is for Hopper")
    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "driver": Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split("\n")[0],
        "platform": platform.platform(),
    }  # fmt: skip


def main() -> int:
    """Run all cases; 1 if a bit of `wgmma` differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--tiles", type=int, default=2000, help="tiles of 64x8 a case")
    parser.add_argument("--keep", type=int, default=4, help="tiles a case that are written")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: the host side only")
    args = parser.parse_args()
    about, rng = machine(args.dry_run), np.random.default_rng(0)
    results: dict = {}
    arrays: dict = {}
    for kind, start, K in CASES:
        a, b = tiles(kind, args.tiles, K, rng)
        c = accumulators(start, args.tiles, rng)
        expected = emulated(a, b, c)
        got = expected if args.dry_run else on_gpu(a, b, c)
        differ = got.view(np.uint32) != expected.view(np.uint32)
        name = f"wgmma_{kind}_c-{start}_k{K}"
        results[name] = {"mismatches": int(differ.sum()), "of": differ.size}
        if differ.any():
            where = tuple(int(i) for i in np.argwhere(differ)[0])
            results[name]["first"] = {
                "at": where, "c": None if c is None else hex(int(c.view(np.uint32)[where])),
                "gpu": hex(int(got.view(np.uint32)[where])), "emulator": hex(int(expected.view(np.uint32)[where])),
            }  # fmt: skip
        print(f"{name:36} {results[name]['mismatches']:8,} of {differ.size:,} differ")
        parts = {"a": a, "b": b, "d": got.view(np.uint32)} | ({} if c is None else {"c": c.view(np.uint32)})
        arrays |= {f"{name}.{part}": array[: args.keep] for part, array in parts.items()}
    if not args.dry_run:
        scaled_mm(results, arrays)
    np.savez_compressed(f"{args.out}.npz", **arrays)
    digest = hashlib.sha256(Path(f"{args.out}.npz").read_bytes()).hexdigest()
    record = {"machine": about, "results": results, "sha256": digest}
    Path(f"{args.out}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(r.get("mismatches") for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
