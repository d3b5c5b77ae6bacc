"""``generate``: continue a prompt with the model of a run folder or of a released-format directory."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..generation import generate
from ..generation.generate import Generation
from ..generation.load import Speaker, load_speaker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``generate``."""
    parser.add_argument("run", metavar="DIR", help="a run folder, finished or not, or a released-format directory")
    parser.add_argument("--prompt", default="", help="text to continue (default: the beginning of a document)")
    parser.add_argument("--max-new-tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speculative", action="store_true", help="let the MTP modules draft")
    parser.add_argument("--stream", action="store_true", help="print each token as it is certain")
    parser.add_argument("--json", action="store_true", help="print tokens, speed, cache size and acceptance as JSON")


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    if args.max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} is negative")
    speaker = load_speaker(Path(args.run))
    try:
        prompt = [speaker.tokenizer.boundary, *speaker.tokenizer.encode(args.prompt).tolist()]
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode: {error}") from None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the model may write what this console can't show
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may take several tokens

    def show(token: int) -> None:
        print(decoder.decode(speaker.tokenizer.decode_bytes([token])), end="", flush=True)

    streaming = args.stream and not args.json
    if streaming:
        print(args.prompt, end="", flush=True)
    result = continue_prompt(
        speaker, prompt, args.max_new_tokens, show if streaming else None, temperature=args.temperature,
        top_p=args.top_p, rng=np.random.default_rng(args.seed), speculative=args.speculative,
    )  # fmt: skip
    text = speaker.tokenizer.decode(result.tokens[0])
    if args.json:
        print(json.dumps(as_json(args.prompt, text, result)))
    else:
        print(decoder.decode(b"", final=True) if streaming else args.prompt + text)
        print(summary(result), file=sys.stderr)
    return 0


def continue_prompt(
    speaker: Speaker, prompt: list[int], max_new_tokens: int, show: Callable[[int], object] | None = None, **how: Any
) -> Generation:
    """`generate` for one prompt of any length: where the trained context is full, the second half of it goes on."""
    tokens: list[int] = []
    total = Generation([], 0.0, 0.0, 0)
    while True:
        seen = [*prompt, *tokens]
        if len(seen) >= speaker.context:
            seen = seen[-max(speaker.context // 2, 1) :]
        room = min(max(speaker.context - len(seen), 1), max_new_tokens - len(tokens))
        part = generate(speaker.model, [seen], room, stream=None if show is None else lambda i, t: show(t), **how)
        tokens += part.tokens[0].tolist()
        total.seconds += part.seconds
        total.main_passes += part.main_passes
        total.cache_bytes_per_token = max(total.cache_bytes_per_token, part.cache_bytes_per_token)
        for name in ("accepted_by_depth", "drafted_by_depth"):
            before = getattr(total, name) or [0] * len(getattr(part, name))
            setattr(total, name, [a + b for a, b in zip(before, getattr(part, name))])
        if len(tokens) >= max_new_tokens:
            total.tokens = [np.array(tokens, dtype=np.int64)]
            return total


def as_json(prompt: str, text: str, result: Generation) -> dict[str, Any]:
    """What ``--json`` prints."""
    drafted = result.drafted_by_depth
    return {
        "prompt": prompt,
        "text": text,
        "tokens": result.tokens[0].tolist(),
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "cache_bytes_per_token": result.cache_bytes_per_token,
        "main_passes": result.main_passes,
        "accepted_by_depth": result.accepted_by_depth,
        "acceptance_by_depth": [a / d if d else None for a, d in zip(result.accepted_by_depth, drafted)],
    }


def summary(result: Generation) -> str:
    """One line of measurements."""
    text = f"[{len(result.tokens[0])} tokens, {result.tokens_per_second:,.0f} tokens/s"
    text += f", cache {result.cache_bytes_per_token:,.0f} bytes a token, {result.main_passes} passes"
    for depth, (a, d) in enumerate(zip(result.accepted_by_depth, result.drafted_by_depth), start=1):
        text += f", MTP depth {depth} accepted {a} of {d}"
    return text + "]"
