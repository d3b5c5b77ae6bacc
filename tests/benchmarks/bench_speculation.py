"""Does drafting with the MTP module pay? Acceptance, tokens a pass and seconds, for each kind of text.

    python tests/benchmarks/bench_speculation.py RUN --data shakespeare speeches python [--json]

Prompts are pieces of each corpus's validation documents, of half the trained context; the other half is generated,
plainly and with speculation in turn. Greedy text of a small model runs into loops that are easy to guess, so sampled
text is the honest row.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from minidsv3 import generate
from minidsv3.data import ByteTokenizer, load_corpus, split_documents, validation_windows
from minidsv3.generation.load import load_run


def prompts_of(corpus: str, context: int, count: int) -> np.ndarray:
    """First halves of evenly spaced validation windows, int64 [count, context / 2]."""
    _, validation = split_documents(load_corpus(corpus).documents)
    windows, _, _ = validation_windows(validation, ByteTokenizer(), context)
    return windows[np.linspace(0, len(windows) - 2, count, dtype=np.int64), : context // 2].astype(np.int64)


def measure(model: Any, prompts: np.ndarray, new: int, temperature: float, rounds: int = 3) -> dict[str, Any]:
    """Acceptance, tokens a pass of the main model, and the time with speculation over the time without."""
    accepted, drafted, passes, ratios, plain = 0, 0, 0, [], []
    for seed in range(rounds):
        seconds = {}
        for speculative in (False, True):
            seconds[speculative] = 0.0
            for i, prompt in enumerate(prompts):  # one at a time, as speculation does
                rng = np.random.default_rng([seed, i])
                out = generate(model, [prompt], new, temperature=temperature, rng=rng, speculative=speculative)
                seconds[speculative] += out.seconds
                if speculative:
                    accepted = accepted + np.array(out.accepted_by_depth)
                    drafted = drafted + np.array(out.drafted_by_depth)
                    passes += out.main_passes
        ratios.append(seconds[True] / seconds[False])
        plain.append(seconds[False] / (len(prompts) * new))
    return {
        "acceptance": (accepted / drafted).tolist(),
        "tokens_per_pass": rounds * len(prompts) * new / passes,
        "microseconds_per_token": statistics.median(plain) * 1e6,
        "time_ratio": statistics.median(ratios),
    }


def main() -> None:
    """Measure every corpus, greedily and sampled, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", nargs="+", required=True, help="corpora whose validation parts give the prompts")
    parser.add_argument("--prompts", type=int, default=24, help="of each corpus")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    run = load_run(args.run)
    context = run.train.seq_len
    prompts = {corpus: prompts_of(corpus, context, args.prompts) for corpus in args.data}
    rows = [
        {"data": corpus, "temperature": t, **measure(run.model, prompts[corpus], context - context // 2, t)}
        for corpus in args.data
        for t in args.temperature
    ]
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        accepted = ", ".join(f"{a:.0%}" for a in row["acceptance"])
        print(
            f"{row['data']:12} temperature {row['temperature']:.1f}: accepted {accepted}, {row['tokens_per_pass']:.2f} "
            f"tokens a pass; plain {row['microseconds_per_token']:.0f} us a token, with speculation "
            f"{row['time_ratio']:.2f} of that"
        )


if __name__ == "__main__":
    main()
