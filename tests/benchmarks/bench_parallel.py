"""How fast ranks are simulated: `python tests/benchmarks/bench_parallel.py [--tokens 4096]`, one BLAS thread.

* dispatch and combine at DeepSeek-V3's gate (EP64, 8 GPUs a node, top-8 of 256 in 4 of 8 groups), rows 128 wide, on
  the exact wire: the first call, the median of the later ones, and with twice the tokens;
* a step of `tiny` on 8 simulated ranks beside the plain run of the same batch, turn by turn, one worker each: the
  median of the ratios.
"""

import argparse
import time

import numpy as np
from threadpoolctl import threadpool_limits

from minidsv3.autograd import Tensor, no_grad
from minidsv3.config import ModelConfig, TrainConfig, replace_settings
from minidsv3.model.moe import LocalTokenDispatcher
from minidsv3.model.transformer import Transformer
from minidsv3.ops.routing import select_experts
from minidsv3.parallel.comm import SimCommunicator
from minidsv3.parallel.dispatcher import AllToAllTokenDispatcher
from minidsv3.parallel.ledger import Ledgered
from minidsv3.parallel.ranks import Ranks
from minidsv3.parallel.wire import WIRES
from minidsv3.train.machine import keep_freed_memory
from minidsv3.train.spread import Alone, OnRanks
from minidsv3.train.step import cut, train_step

V3 = dict(top_k=8, n_group=8, topk_group=4, method="noaux_tc")


def dispatch_seconds(tokens, wire, calls=5, ranks=64, width=128):
    """Seconds of each dispatch + combine."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((tokens, width)).astype(np.float32) for _ in range(ranks)]
    idx = [select_experts(rng.random((tokens, 256)).astype(np.float32), None, **V3) for _ in range(ranks)]
    weight = np.full((tokens, 8), 0.125, dtype=np.float32)
    on = Ranks(Ledgered(SimCommunicator(ranks, 8)))
    dispatcher = AllToAllTokenDispatcher(on, 256, WIRES[wire])

    def program(rank):
        with no_grad():
            dispatcher.combine(*dispatcher.dispatch(Tensor(x[rank]), idx[rank], Tensor(weight)))

    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        on.run(program)
        seconds.append(time.perf_counter() - start)
    return seconds


def stepper(cfg, train, spread):
    """A function that does one step."""
    model = Transformer(cfg, dispatcher=spread.dispatcher)
    model.init_weights(np.random.default_rng(0))
    optimizer, gradients = spread.prepare(model, train)
    tokens = np.random.default_rng(1).integers(0, 257, (train.batch_size, train.seq_len + 1))
    shards, steps = cut(tokens[:, :-1], tokens[:, 1:], train.shards), iter(range(1, 10**6))

    def step():
        start = time.perf_counter()
        train_step(model, optimizer, gradients, shards, train, next(steps), spread.step_run(map), spread.add_up)
        return time.perf_counter() - start

    return step


def on_ranks(cfg, ranks, gpus_per_node, workers=1):
    threads = Ranks(Ledgered(SimCommunicator(ranks, gpus_per_node)), workers)
    E = cfg.n_routed_experts
    return OnRanks(threads, AllToAllTokenDispatcher(threads, E, alone=LocalTokenDispatcher(E)), {})


def step_ratio(preset="tiny", ranks=8, rounds=12):
    """Seconds of the plain step, of the step on ranks, and the median ratio."""
    cfg, train = ModelConfig.preset(preset), TrainConfig.preset(preset)
    plain = stepper(cfg, train, Alone())
    spread = stepper(*replace_settings(cfg, train, dict(shards=ranks)), on_ranks(cfg, ranks, ranks))
    plain(), spread()
    pairs = [(plain(), spread()) for _ in range(rounds)]
    return *np.median(pairs, axis=0), float(np.median([b / a for a, b in pairs]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--wire", default="exact", choices=WIRES)
    parser.add_argument("--only", choices=("dispatch", "step"))
    args = parser.parse_args()
    keep_freed_memory(trim=False)
    with threadpool_limits(1, user_api="blas"):
        if args.only != "step":
            for tokens in (args.tokens // 2, args.tokens):
                first, *later = dispatch_seconds(tokens, args.wire)
                print(f"dispatch + combine, EP64, {tokens} tokens a rank, {args.wire} wire: first {first:.2f} s, "
                      f"then {np.median(later):.2f} s (worst {max(later):.2f})", flush=True)  # fmt: skip
        if args.only != "dispatch":
            plain, ranks, ratio = step_ratio()
            print(f"tiny: plain {1e3 * plain:.0f} ms, on 8 ranks {1e3 * ranks:.0f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
