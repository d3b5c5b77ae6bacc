"""``train``: a model into a run folder, or further into it with ``--resume``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from ..config import PRECISIONS, PRESETS, ModelConfig, TrainConfig, replace_settings
from ..hardware.trace import Span, write_trace
from ..model.moe import LocalTokenDispatcher
from ..ops.plain import using_plain_ops
from ..parallel.comm import RankError, SimCommunicator
from ..parallel.dispatcher import AllToAllTokenDispatcher
from ..parallel.faults import KINDS, Fault, Faulty
from ..parallel.ledger import Ledgered
from ..parallel.ranks import Ranks
from ..parallel.wire import WIRES
from ..plots import description, new_figure, save, style
from ..quant.recipe import recipe_for
from ..train.figures import run_figures
from ..train.machine import sgemm_gflops, workers_for
from ..train.profile import Profile
from ..train.profile_figures import time_per_op
from ..train.runs import read_run
from ..train.spread import Alone, OnRanks
from ..train.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``train``."""
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help="model and training settings to start from")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run folder")
    parser.add_argument("--data", help="corpus (see `data list`), several joined by +, or a UTF-8 file")
    parser.add_argument("--steps", type=int, help="total number of steps, also with --resume")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--workers", type=int, help="threads; never changes the result (default: cores, shards)")
    parser.add_argument("--init-from", metavar="DIR", help="start with the weights of a run or a model directory")
    parser.add_argument("--ranks", type=int, metavar="R", help="spread the step over R ranks, one shard each")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="ranks that share a node (default: 8, or all)")
    parser.add_argument("--comm", choices=("sim", "mpi"), default="sim", help="ranks in this process, or under mpiexec")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="KIND:RANK:CALL[:OPERATION[:SECONDS]]",
        help=f"let a rank fail at a collective; kinds: {', '.join(KINDS)}",
    )  # fmt: skip
    parser.add_argument(
        "--trace-routing", type=int, default=0, metavar="N", help="keep the routing of every N-th step for `simulate`"
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for another process (mpi)")
    parser.add_argument("--wire", choices=WIRES, default="exact", help="what rows look like on a link")
    parser.add_argument(
        "--precision", metavar="NAME", help=f"{', '.join(PRECISIONS)}; rows change as in fp8:lm_head=fp8,moments=fp32"
    )
    parser.add_argument("--accumulate", choices=("fast", "exact"), help="FP8 sums: BLAS, or the emulated tensor core")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in DIR")
    parser.add_argument("--plain", action="store_true", help="run the textbook form of every op (slow)")
    parser.add_argument("--profile", action="store_true", help="time every op of ten steps; table, figure and trace")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--set", dest="settings", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any field of ModelConfig or TrainConfig; values as in JSON",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train; 0 when done, 130 after Ctrl-C."""
    settings = parse_settings(args.settings)
    if args.ranks is not None:
        settings["shards"] = args.ranks
    flags = ("data", "steps", "seed", "workers", "init_from", "precision", "accumulate")
    settings |= {k: v for k in flags if (v := getattr(args, k)) is not None}
    recipe = recipe_for(str(settings.get("precision", "fp32")), str(settings.get("accumulate", "fast")))
    if recipe:
        settings = {"moments_dtype": recipe.moments_dtype} | settings
        if args.plain:
            raise ValueError(f"--plain has the textbook ops, which know no precision={recipe.name!r}: leave one out")
    model, train = replace_settings(ModelConfig.preset(args.preset), TrainConfig.preset(args.preset), settings)
    if args.ranks is not None and args.comm == "mpi":
        return _under_mpi(lambda: _train(args, model, train))
    return _train(args, model, train)


def _train(args: argparse.Namespace, model: ModelConfig, train: TrainConfig) -> int:
    spread = Alone() if args.ranks is None else spread_over_ranks(args, model, train)
    recipe = recipe_for(train.precision, train.accumulate)
    profile = profile_into(Path(args.out), train) if args.profile else None
    trainer = Trainer(
        model, train, args.out, recipe=recipe, preset=args.preset, resume=args.resume,
        report=print if spread.is_root else lambda said: None,
        progress=spread.is_root and not args.quiet and sys.stderr.isatty(), on_evaluation=_say, spread=spread,
        on_step=profile,
        trace_routing=args.trace_routing,
    )  # fmt: skip
    with using_plain_ops() if args.plain else nullcontext(), closing(profile) if profile else nullcontext():
        done = trainer.run()
    if isinstance(spread, OnRanks):
        ledger = spread.comm.gathered()
        if spread.is_root:
            ledger.write_csv(trainer.out / "ledger.csv")
    if not done:
        return 130
    if not spread.is_root:
        return 0
    run_figures(read_run(args.out))
    print(f"done: {args.out}/final holds the model; try: python -m minidsv3 generate {args.out} --prompt 'ROMEO:'")
    return 0


def spread_over_ranks(args: argparse.Namespace, model: ModelConfig, train: TrainConfig) -> OnRanks:
    """Communicator, ledger, ranks and dispatcher of ``--ranks``, put together."""
    gpus_per_node = args.gpus_per_node or min(8, args.ranks)
    if args.comm == "mpi":
        try:
            from ..parallel.mpi import MPICommunicator
        except ImportError:
            raise ValueError("--comm mpi needs the extra: pip install 'minidsv3[mpi]'") from None
        engine: Any = MPICommunicator(args.ranks, gpus_per_node, args.timeout)
    else:
        engine = SimCommunicator(args.ranks, gpus_per_node)
    workers = (train.workers or 1) if args.comm == "mpi" else workers_for(train.workers, args.ranks)
    comm: Any = Ledgered(engine)
    if args.fault:
        comm = Faulty(comm, [Fault.parse(text) for text in args.fault], args.timeout)
    ranks = Ranks(comm, workers, args.timeout)
    E = model.n_routed_experts
    dispatcher = AllToAllTokenDispatcher(ranks, E, WIRES[args.wire], alone=LocalTokenDispatcher(E))
    description = {"ranks": args.ranks, "gpus_per_node": gpus_per_node, "comm": args.comm, "wire": args.wire}
    return OnRanks(ranks, dispatcher, description)


def _under_mpi(train: Callable[[], int]) -> int:
    """Run `train`; an error here must not leave the other processes waiting.

    After a RankError the others are left alone: each notices itself. MPI can't be finalised without the dead one, so
    this process ends at once.
    """
    try:
        return train()
    except Exception as error:
        print(f"minidsv3 train: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if isinstance(error.__cause__ or error.__context__ or error, RankError):
            os._exit(2)
        from ..parallel.mpi import abort

        abort()
        raise


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` strings as a dict; a value is JSON, or else a string."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair!r} is not KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def profile_into(out: Path, train: TrainConfig) -> Profile:
    """A profile of ten steps that prints its table and leaves ``figures/profile.png`` and ``trace.json`` in `out`."""
    workers = workers_for(train.workers, train.shards)
    peak = sgemm_gflops(workers)

    def report(profile: Profile) -> None:
        print(profile.table())
        figure, (ax,) = new_figure(panel=(8.0, 5.2))
        with style():
            time_per_op(ax, profile.rows(), peak / workers, profile.share_of_peak)
        rows = profile.rows()
        data = {name: [getattr(row, name) for row in rows] for name in rows[0]._fields}
        save(figure, out / "figures" / "profile.png", data=data, text=description(ax))
        spans = (
            Span(s.name, s.start, s.seconds, "training", f"worker {s.thread}", s.phase, {"module": s.scope})
            for s in profile.samples
        )
        write_trace(out / "trace.json", spans)
        print(f"{out / 'figures' / 'profile.png'}; {out / 'trace.json'} opens in Perfetto (ui.perfetto.dev)")

    return Profile(workers, peak, report)


def _say(trainer: Trainer, step: int, bits: float) -> None:
    trainer.message(f"step {step:>6}: validation {bits:.3f} bits per byte")
