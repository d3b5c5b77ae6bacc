"""``demo``: see it work in five minutes.

First a figure within seconds (`nano` on our own synthetic text, no network); then the Shakespeare corpus, `tiny`
trained on it for at most three minutes with samples on the way, figures, a last sample and what to try next. How many
steps fit is measured first, so a slow machine trains less and a fast one does not wait.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ..config import ModelConfig, TrainConfig, replace_settings
from ..data import ByteTokenizer, build_corpus, load_corpus
from ..generation.load import Speaker
from ..model.figures import token_journey
from ..model.transformer import Transformer
from ..plots import description, new_figure, save, style
from ..train.figures import loss_curves, run_figures
from ..train.machine import keep_freed_memory, worker_pool, workers_for
from ..train.optim import AdamW, FlatParameters
from ..train.runs import read_run
from ..train.step import cut, train_step
from ..train.trainer import Trainer
from .generate import continue_prompt

MOST_STEPS = 2500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``demo``."""
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="run folder (a number is added if it exists)")
    parser.add_argument("--seconds", type=float, default=155.0, help="time for training `tiny`")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """The whole demo."""
    if args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds} is not positive")
    out = _free_folder(Path(args.out))
    print("1. A small model (nano) on synthetic text, to see that everything works.")
    _first_figure(out.with_name(out.name + "-first-figure.png"), args.seed)
    print("\n2. The corpus.")
    data = _corpus()
    model, train = ModelConfig.preset("tiny"), TrainConfig.preset("tiny")
    keep_freed_memory()
    steps = _steps_that_fit(model, train, args.seconds)
    print(f"\n3. Training tiny (MLA, 8 experts, MTP) for {steps} steps on {data}; Ctrl-C saves and stops.")
    # Validation takes seconds, so it waits for the end; a sample says as much on the way.
    settings = {"data": data, "steps": steps, "seed": args.seed, "eval_every": 0, "checkpoint_every": -(-steps // 3)}
    model, train = replace_settings(model, train, settings)
    start = time.perf_counter()
    trainer = Trainer(model, train, out, preset="tiny", progress=sys.stderr.isatty(), on_step=_show_sample)
    if not trainer.run():
        return 130
    print(f"trained in {time.perf_counter() - start:.0f} s")
    _write_figures(out, trainer)
    print("\n4. A last sample:\n" + _sample(trainer, 400))
    _what_next(out)
    return 0


def _first_figure(path: Path, seed: int) -> None:
    start = time.perf_counter()
    settings = {"data": "synthetic", "steps": 60, "warmup_steps": 10, "seed": seed, "checkpoint_every": 0}
    model, train = replace_settings(ModelConfig.preset("nano"), TrainConfig.preset("nano"), settings)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model, train, Path(folder) / "run", preset="nano", progress=sys.stderr.isatty()).run()
        done = read_run(Path(folder) / "run")
        figure, (ax,) = new_figure()
        with style():
            loss_curves(ax, done.step, done.metrics["main_loss"], done.metrics["mtp_loss"], smoothing=0.7)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: done.metrics[name] for name in ("step", "main_loss", "mtp_loss")}
        save(figure, path, data=columns, text=description(ax))
    print(f"first figure after {time.perf_counter() - start:.0f} s: {path}")


def _corpus() -> str:
    """Shakespeare, or text that is on every machine when there is no network."""
    try:
        load_corpus("shakespeare")
    except ValueError:
        try:
            build_corpus("shakespeare")
        except (ValueError, OSError) as error:
            print(f"Shakespeare can't be fetched ({error}); using the texts of Python's own help instead.")
            return "pydoc"
    return "shakespeare"


def _steps_that_fit(model_config: ModelConfig, cfg: TrainConfig, seconds: float) -> int:
    """Steps of this machine in `seconds`, to twenty, at most MOST_STEPS; measured on random tokens."""
    rng, times = np.random.default_rng(0), []
    model = Transformer(model_config)
    model.init_weights(rng)
    flat = FlatParameters(model)
    optimizer, gradients = AdamW(flat, cfg), [flat.new_gradient() for _ in range(cfg.shards)]
    tokens = rng.integers(0, model_config.vocab_size, (cfg.batch_size, cfg.seq_len + 1))
    shards = cut(tokens[:, :-1], tokens[:, 1:], cfg.shards)
    with worker_pool(workers_for(cfg.workers, cfg.shards)) as run:
        for step in range(1, 13):
            start = time.perf_counter()
            train_step(model, optimizer, gradients, shards, cfg, step, run)
            times.append(time.perf_counter() - start)
    fit = int(seconds / np.median(times[2:]))
    return max(100, min(fit // 20 * 20, MOST_STEPS))


def _sample(trainer: Trainer, length: int, temperature: float = 0.7) -> str:
    tokenizer, cfg = ByteTokenizer(), trainer.train
    prompt = [tokenizer.boundary, *tokenizer.encode("ROMEO:\n" if cfg.data == "shakespeare" else "").tolist()]
    speaker, rng = Speaker(trainer.model, tokenizer, cfg.seq_len), np.random.default_rng(cfg.seed)
    result = continue_prompt(speaker, prompt, length, temperature=temperature, top_p=0.95, rng=rng)
    return tokenizer.decode([*prompt, *result.tokens[0].tolist()])


def _show_sample(trainer: Trainer, step: int) -> None:
    """A line of text from the model every fifth of the run."""
    every = -(-trainer.train.steps // 5)
    if step % every == 0 and step < trainer.train.steps:
        text = " / ".join(_sample(trainer, 100).splitlines())
        trainer.message(f"step {step:>5} writes: {text}")


def _write_figures(out: Path, trainer: Trainer) -> None:
    files = run_figures(read_run(out))
    tokenizer = ByteTokenizer()
    text = (
        "ROMEO:\nBut soft, what light through yonder wind" if trainer.train.data == "shakespeare" else "The return val"
    )
    tokens = np.concatenate([[tokenizer.boundary], tokenizer.encode(text)])
    names = [repr(tokenizer.decode([i]))[1:-1].replace(" ", "·") for i in range(256)] + ["end of document"]
    labels = ["¶", *(c.replace("\n", "↵").replace(" ", "·") for c in text)]
    figure = token_journey(trainer.model, tokens, labels, names)
    files += save(figure, out / "figures" / "journey.png", data=None, text=description(*figure.axes))
    last = read_run(out).metrics["val_bits_per_byte"][-1]
    print(f"validation: {last:.3f} bits per byte. Figures in {out / 'figures'}: ", end="")
    print(", ".join(sorted({file.name for file in files if file.suffix == ".png"})))


def _what_next(out: Path) -> None:
    print(
        f"""
What to try next:
  python -m minidsv3 generate {out} --prompt "JULIET:"
  python -m minidsv3 train --preset tiny --steps 2000 --out runs/unbalanced --set bias_update_speed=0 balance_weight=0
  python -m minidsv3 compare {out} runs/unbalanced --figure runs/compare.png
  make lab                                             opens the lessons"""
    )


def _free_folder(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    tries = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(folder for folder in tries if not folder.exists())
