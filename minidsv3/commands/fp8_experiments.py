"""The experiments of ``fp8 experiment``: recipes are built here, runs started, figures and their data written.

accumulation  largest error of sums against K, with and without promotion
interval      why 128: errors and costs of promotion intervals
gradients     output gradients in 1x128 tiles and in 128x128 blocks
logfmt        formats for sending activations
memory        bytes kept for the backward pass
rounding      what FP8's rounding costs a model that was trained in BF16, against learning rate and step
twins         loss of FP8 variants against BF16, with the floor (minutes to hours; finished runs are kept in DIR/runs)
sensitivity   `fp8` with one row changed
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .. import plots
from ..autograd import Function, OpEvent, backward, no_grad, observing, replacing
from ..config import ModelConfig, TrainConfig
from ..data import ByteTokenizer, load_corpus, split_documents, validation_windows
from ..model.transformer import Transformer
from ..ops.norm import RMSNormFunction
from ..ops.routing import PermuteFunction
from ..ops.swiglu import SwiGLUFunction
from ..quant import figures
from ..quant.experiments import DISTRIBUTIONS, accumulation_error, interval_prices, tile_against_block
from ..quant.logfmt import compared
from ..quant.recipe import recipe_for
from ..train.twins import SMALL, relative_difference, rounding_cost, tail_mean, twin

LENGTHS = (512, 1024, 2048, 4096)
INTERVALS = (32, 64, 128, 512, 4096)
RATES = (3e-4, 1e-3, 3e-3)
VARIANTS = ("bf16~ulp", "fp8", "fp8-tensorwise", "fp8-blockwise-dgrad")  # against bf16
CHANGES = {
    "head": "lm_head=fp8", "gate": "gate=fp8", "attention": "attention=fp8", "o_proj kept in E4M3": "o_proj=fp8",
    "embedding": "embed_tokens=fp8", "FP32 moments": "moments=fp32",
}  # fmt: skip


def accumulation(out: Path, args: argparse.Namespace) -> None:
    """Error against K for three distributions; at the longest K the spread over five seeds."""
    errors: dict[str, np.ndarray] = {}
    for distribution in DISTRIBUTIONS:
        for label, every in (("one chain", None), ("every 128", 128)):
            errors[f"{distribution}, {label}"] = np.array(
                [accumulation_error(distribution, K, promote_every=every) for K in LENGTHS]
            )
    for distribution in DISTRIBUTIONS:
        seeds = [accumulation_error(distribution, LENGTHS[-1], seed=s) for s in range(5)]
        print(f"{distribution}, one chain, five seeds: {', '.join(f'{e:.2%}' for e in seeds)}")
    figure, (ax,) = plots.new_figure()
    with plots.style():
        figures.accumulation_curves(ax, np.array(LENGTHS), errors, "every 128")
    _save(figure, out / "fp8_accumulation.png", {"K": LENGTHS, **errors})


def interval(out: Path, args: argparse.Namespace) -> None:
    """Errors and costs for each interval."""
    prices = interval_prices(INTERVALS)
    figure, (ax,) = plots.new_figure()
    with plots.style():
        figures.price_of_precision(ax, prices)
    _save(figure, out / "fp8_interval.png", {n: [getattr(p, n) for p in prices] for n in prices[0]._fields})


def gradients(out: Path, args: argparse.Namespace) -> None:
    """Errors of output gradients by kind of layer, of a model that has learned for a while."""
    by_layer: dict[str, list[tuple[float, float]]] = {}

    def look(event: OpEvent) -> None:
        if event.phase == "backward" and type(event.op).__name__ in ("LinearFunction", "GroupedLinearFunction"):
            dy = event.inputs[0].data
            kind = event.op._scope.rsplit(".", 1)[-1]
            by_layer.setdefault(kind, []).append(tile_against_block(dy.reshape(-1, dy.shape[-1])))

    model, batch = _trained(args.steps or 300)
    with observing(look):
        backward(model.loss(*batch).total)
    by_layer.pop("gate", None)
    layers = sorted(by_layer)
    tile, block = (np.array([np.mean([pair[i] for pair in by_layer[n]]) for n in layers]) for i in (0, 1))
    figure, (ax,) = plots.new_figure()
    with plots.style():
        figures.gradient_blocks(ax, layers, tile, block)
    _save(figure, out / "fp8_gradients.png", {"layer": layers, "tile": tile, "block": block})


def logfmt(out: Path, args: argparse.Namespace) -> None:
    """Errors of formats on what the layers hand to the residual stream and on what is dispatched."""
    model, batch = _trained(args.steps or 300)
    found: dict[str, list[np.ndarray]] = {}

    def look(event: OpEvent) -> None:
        if event.phase != "forward":
            return
        name, x, y = type(event.op).__name__, event.inputs[0].data, event.outputs[0].data
        if name == "GroupedLinearFunction":
            goes_in = x.shape[1] == model.config.hidden_size
            found.setdefault("dispatched to experts" if goes_in else "combined", []).append(x if goes_in else y)
        elif name == "LinearFunction" and event.op._scope.endswith("o_proj"):
            found.setdefault("attention's output", []).append(y.reshape(-1, y.shape[-1]))

    with no_grad(), observing(look):
        model.loss(*batch)
    errors = {place: compared(np.concatenate(arrays)) for place, arrays in found.items()}
    figure, (ax,) = plots.new_figure()
    with plots.style():
        figures.format_errors(ax, errors)
    names = list(next(iter(errors.values())))
    _save(figure, out / "fp8_logfmt.png", {"format": names, **{p: [e[n] for n in names] for p, e in errors.items()}})


def memory(out: Path, args: argparse.Namespace) -> None:
    """nbytes of the arrays that `save` holds, a token of `tiny`, by kind of op."""
    saved = {precision: saved_bytes(precision) for precision in ("fp32", "bf16", "fp8")}
    whole = sum(saved["fp32"].values())
    for precision in saved:
        as_it_runs = sum(saved_bytes(precision, again=True).values())
        print(f"{precision}, making again what costs no gemm, keeps {as_it_runs:,.0f} bytes, {as_it_runs / whole:.0%}")
    figure, (ax,) = plots.new_figure(panel=(8.0, 4.0))
    with plots.style():
        figures.saved_memory(ax, saved)
    kinds = list(saved["fp32"])
    _save(figure, out / "fp8_memory.png", {"kind": kinds, **{p: [s[k] for k in kinds] for p, s in saved.items()}})
    for name, bytes_per_number in (("BF16", 2.0), ("FP8 with 1x128 scales", 1 + 4 / 128)):
        print(f"dispatch of a token of 7,168 in {name}: {7168 * bytes_per_number:,.0f} bytes")


def saved_bytes(precision: str, shape: tuple[int, int] = (16, 128), again: bool = False) -> dict[str, float]:
    """Bytes a token that one forward pass of `tiny` keeps, each array once; float32 weights are not counted.

    `again`: inputs of linear layers that can be made again are not kept, as in training. Else that holds for FP8's
    SwiGLU alone, which is part of the report's recipe.
    """
    makers: list[type[Function]] = [] if again else [RMSNormFunction, PermuteFunction]
    if not again and precision != "fp8":
        makers.append(SwiGLUFunction)
    model = Transformer(ModelConfig.preset("tiny"), recipe_for(precision))
    model.init_weights(np.random.default_rng(0))
    places = {
        "LinearFunction": "inputs of linear layers", "GroupedLinearFunction": "inputs of linear layers",
        "SwiGLUFunction": "inputs of SwiGLU", "AttentionFunction": "attention", "RMSNormFunction": "norms",
    }  # fmt: skip
    kinds = dict.fromkeys([*dict.fromkeys(places.values()), "low-precision weights", "the rest"], 0.0)
    seen: dict[int, object] = {}  # holds the arrays, so that no address is given twice

    def look(event: OpEvent) -> None:
        if event.phase != "forward":
            return
        name, saved = type(event.op).__name__, list(event.op.saved)
        split = {"LinearFunction": len(saved) - 1, "GroupedLinearFunction": 0}.get(name)
        weights = saved[split:] if name == "LinearFunction" else saved[: len(getattr(event.op, "_ranges", ()))]
        for part in saved:
            is_weight = any(part is w for w in weights)
            if is_weight and precision == "fp32":
                continue
            whole = part if part.__class__ is not np.ndarray or part.base is None else part.base
            if id(whole) not in seen:
                seen[id(whole)] = whole
                kinds["low-precision weights" if is_weight else places.get(name, "the rest")] += part.nbytes

    tokens = np.random.default_rng(0).integers(0, 257, (shape[0], shape[1] + 1))
    with observing(look), ExitStack() as stack:
        for maker in makers:
            stack.enter_context(replacing(maker, type(maker.__name__, (maker,), {"again": Function.again})))
        model.loss(tokens[:, :-1], tokens[:, 1:])
    return {kind: size / (shape[0] * shape[1]) for kind, size in kinds.items()}


def rounding(out: Path, args: argparse.Namespace) -> None:
    """BF16's weights read by `fp8`, along training at three learning rates (of `--batch`, first seed)."""
    steps, recipe = args.steps or 1000, recipe_for("fp8")
    marks = np.unique(np.linspace(0, steps, 11, dtype=np.int64))[1:]

    def along_training(rate: float) -> np.ndarray:
        print(f"training in BF16 at {rate:g}, {steps} steps", flush=True)
        cfg, costs = _settings(steps, args.seeds[0], args.batch, rate), []
        batches = _validation(cfg.data, cfg.seq_len)

        def measure(step: int, model: Transformer, loss: float) -> None:
            if step in marks:
                costs.append(rounding_cost(model, recipe, batches))

        twin(recipe_for("bf16"), cfg, on_step=measure)
        print(f"  rounding costs {', '.join(f'{cost:+.3%}' for cost in costs)}")
        return np.array(costs)

    costs = {f"{rate:g}": along_training(rate) for rate in RATES}
    figure, (ax,) = plots.new_figure(panel=(8.0, 4.0))
    with plots.style():
        figures.rounding_costs(ax, marks, costs)
    _save(figure, out / "fp8_rounding.png", {"step": marks, **costs})


def twins(out: Path, args: argparse.Namespace) -> None:
    """Losses of each variant and seed against BF16 of the same seed."""
    steps = args.steps or 1000
    runs = {
        (name, seed): _losses(out / "runs", name, seed, steps, args.batch, args.lr)
        for seed in args.seeds
        for name in ("bf16", *args.variants)
    }
    differences = {
        name: np.array([relative_difference(runs[name, s], runs["bf16", s]) for s in args.seeds])
        for name in args.variants
    }
    tails = {name: np.array([tail_mean(row) for row in rows]) for name, rows in differences.items()}
    for name, values in tails.items():
        told = f"mean {values.mean():+.3%}" + (f", spread {values.std(ddof=1):.3%}" if len(values) > 1 else "")
        print(f"{name:22} last 200 smoothed steps: {', '.join(f'{value:+.3%}' for value in values)}   {told}")
    every = np.arange(min(9, steps - 1), steps, 10, dtype=np.int64)
    figure, (ax,) = plots.new_figure(panel=(8.0, 4.2))
    with plots.style():
        figures.loss_differences(ax, every + 1, {n: rows[:, every] for n, rows in differences.items()})
    columns = {
        f"{n} seed {s}": np.round(row[every], 6) for n, rows in differences.items() for s, row in zip(args.seeds, rows)
    }
    _save(figure, out / "fp8_twins.png", {"step": every + 1, **columns})
    figure, (ax,) = plots.new_figure(panel=(8.0, 1.2 + 0.45 * len(tails)))
    with plots.style():
        figures.tail_means(ax, tails)
    _save(figure, out / "fp8_ends.png", {"seed": args.seeds, **tails})


def sensitivity(out: Path, args: argparse.Namespace) -> None:
    """`fp8` with one row changed against `fp8`, mean over the last 100 smoothed steps."""
    steps = args.steps or 300

    def ends(name: str) -> np.ndarray:
        losses = [(_losses(out / "runs", name, s, steps), _losses(out / "runs", "fp8", s, steps)) for s in args.seeds]
        return np.array([relative_difference(a, b)[-100:].mean() for a, b in losses])

    differences = {label: ends(f"fp8:{change}") for label, change in CHANGES.items()}
    floor = ends("fp8~ulp")
    for label, values in {"one ulp (floor)": floor, **differences}.items():
        print(f"{label:22} {', '.join(f'{v:+.3%}' for v in values)}   mean {values.mean():+.3%}")
    figure, (ax,) = plots.new_figure()
    with plots.style():
        figures.sensitivity(ax, differences, floor)
    _save(figure, out / "fp8_sensitivity.png", {"seed": args.seeds, "one ulp": floor, **differences})


EXPERIMENTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "accumulation": accumulation, "interval": interval, "gradients": gradients, "logfmt": logfmt, "memory": memory,
    "rounding": rounding, "twins": twins, "sensitivity": sensitivity,
}  # fmt: skip


def _settings(steps: int, seed: int, batch: list[int] | None, lr: float | None) -> TrainConfig:
    changed: dict[str, Any] = {"batch_size": batch[0], "seq_len": batch[1]} if batch else {}
    changed |= {} if lr is None else {"learning_rate": lr}
    return TrainConfig(steps=steps, seed=seed, **SMALL | changed)


def _losses(
    folder: Path, name: str, seed: int, steps: int, batch: list[int] | None = None, lr: float | None = None
) -> np.ndarray:
    """Losses of a twin run, from its file if it has run before.

    Behind the precision, '~ulp' moves the first weights, '@exact' sums as the emulated tensor core does.
    """
    precision, _, accumulate = name.partition("@")
    shape = (f"@{batch[0]}x{batch[1]}" if batch else "") + ("" if lr is None else f"@lr{lr:g}")
    file = folder / f"{precision.replace(':', '+')}@{accumulate or 'fast'}@{seed}@{steps}{shape}.json"
    if not file.is_file():
        print(f"running {name}, seed {seed}, {steps} steps", flush=True)
        recipe = recipe_for(precision.removesuffix("~ulp"), accumulate or "fast")
        result = twin(recipe, _settings(steps, seed, batch, lr), ulp=precision.endswith("~ulp"))
        folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(json.dumps({"losses": [round(v, 7) for v in result.losses.tolist()]}), encoding="utf-8")
        temporary.replace(file)
    return np.array(json.loads(file.read_text(encoding="utf-8"))["losses"], dtype=np.float64)


def _validation(data: str, seq_len: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches that no model has seen."""
    _, documents = split_documents(load_corpus(data).documents)
    tokens_in, targets, _ = validation_windows(documents, ByteTokenizer(), seq_len)
    return [(tokens_in[i : i + 16], targets[i : i + 16]) for i in range(0, min(len(targets), 256), 16)]


def _trained(steps: int) -> tuple[Transformer, tuple[np.ndarray, np.ndarray]]:
    """`tiny` after some steps in float32, and a batch that it has not seen."""
    cfg = TrainConfig(steps=steps, **SMALL)
    print(f"training tiny for {steps} steps", flush=True)
    tokens_in, targets = _validation(cfg.data, 128)[0]
    return twin(None, cfg).model, (tokens_in[:8], targets[:8])


def _save(figure: plots.Figure, path: Path, data: dict) -> None:
    text = plots.description(*figure.axes)
    for file in plots.save(figure, path, data=data, text=text, dpi=80):
        print(file)
    print(text)
