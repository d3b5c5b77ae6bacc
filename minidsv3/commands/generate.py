"""``generate``: continue a prompt with the model of a run folder."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import sys
from pathlib import Path

import numpy as np

from ..data import ByteTokenizer
from ..generation import sample
from ..generation.load import load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``generate``."""
    parser.add_argument("run", metavar="DIR", help="a run folder, finished or not")
    parser.add_argument("--prompt", default="", help="text to continue (default: the beginning of a document)")
    parser.add_argument("--max-new-tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print tokens and text as JSON")


def run(args: argparse.Namespace) -> int:
    """Generate and print, token by token."""
    if args.max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} is negative")
    loaded, tokenizer = load_run(Path(args.run)), ByteTokenizer()
    try:
        prompt = [tokenizer.boundary, *tokenizer.encode(args.prompt)]
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode: {error}") from None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the model may write what this console can't show
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may take several tokens

    def show(token: int) -> None:
        print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)

    if not args.json:
        print(args.prompt, end="", flush=True)
    tokens = sample(
        loaded.model, prompt, args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
        rng=np.random.default_rng(args.seed), context=loaded.train.seq_len, stream=None if args.json else show,
    )  # fmt: skip
    if args.json:
        json.dump({"prompt": args.prompt, "text": tokenizer.decode(tokens), "tokens": tokens.tolist()}, sys.stdout)
    print(decoder.decode(b"", final=True))
    return 0
