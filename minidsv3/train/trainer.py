"""A training run on disk: the step loop, and around it files, progress, evaluation, checkpoints and signals.

The run folder:

    config.json  train.json        what is trained, how, and on which machine
    metrics.jsonl                  one line a step: losses (nats), gradient norm, learning rate, MaxVio, tokens/s, MFU
    experts.jsonl                  one line a step: tokens and bias of every expert of every layer
    checkpoints/step_00000500/     the last `keep` of them (`train.checkpoint`)
    final/                         the trained model as a released-format directory
    routing.safetensors            where tokens went, if asked for (`train.routing`)
    figures/                       drawn by the commands

A run that is killed at any moment resumes from its last checkpoint to the same bits; lines that belong to steps after
that checkpoint are cut first. Ctrl-C finishes the step, saves, and says how to go on.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from ..autograd import Parameter, no_grad, observing, trace
from ..config import ModelConfig, TrainConfig
from ..data import ByteTokenizer, Loader, load_corpus, split_documents, validation_windows
from ..model.transformer import Transformer
from ..pretrained.reader import StoredModel
from ..pretrained.writer import save_pretrained
from ..quant.recipe import Recipe
from .balance import max_vio
from .checkpoint import checkpoints, load_checkpoint, prune, save_checkpoint
from .evaluate import bits_per_byte
from .folder import Description, check_folder
from .machine import blas_is_controlled, environment, keep_freed_memory, sgemm_gflops, worker_pool, workers_for
from .optim import Run
from .routing import RoutingRecorder, route
from .runs import cut_after
from .schedule import batch_size, sequences_before
from .spread import Alone, OnRanks
from .step import NonFiniteError, StepResult, cut, gates, train_step


class Trainer:
    """One run.

    Parameters
    ----------
    model_config, train_config : ModelConfig, TrainConfig
    out : path of the run folder
    recipe : Recipe, optional
        What ``train_config.precision`` names (`quant.recipe.recipe_for`).
    preset : str, optional
        Name to note in train.json.
    resume : bool
        Go on from the newest checkpoint in `out` (from step 0 if there is none).
    report : function of one string
        Where messages go.
    progress : bool
        Show a progress bar.
    on_step : function (trainer, step), optional
        Called after each step: samples.
    on_evaluation : function (trainer, step, val_bits_per_byte), optional
        Called after each evaluation: samples, early figures.
    spread : Alone or OnRanks (`train.spread`)
        Where the shards of a step are computed; only the process that hosts rank 0 writes files.
    trace_routing : int
        Write the routing of every so many steps (1, 1 + n, ...) to routing.safetensors (`train.routing`); 0: of none.

    Raises
    ------
    ValueError
        The folder holds a run and `resume` is false; or resuming under another config.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        train_config: TrainConfig,
        out: str | Path,
        *,
        recipe: Recipe | None = None,
        preset: str | None = None,
        resume: bool = False,
        report: Callable[[str], object] = print,
        progress: bool = True,
        on_step: Callable[[Trainer, int], object] | None = None,
        on_evaluation: Callable[[Trainer, int, float], object] | None = None,
        spread: Alone | OnRanks | None = None,
        trace_routing: int = 0,
    ) -> None:
        self.config, self.train, self.out = model_config, train_config, Path(out)
        self.spread = spread or Alone()
        self._trace_every, self._routing = trace_routing, RoutingRecorder(model_config.n_routed_experts)
        self.report, self._progress = report, progress
        self._on_step, self._on_evaluation = on_step, on_evaluation
        self._stop = False
        if train_config.precision != (recipe.name if recipe else "fp32"):
            raise ValueError(f"precision={train_config.precision!r} is not the recipe that was handed in")
        self._about = self._description(preset)
        if self.spread.is_root:
            check_folder(self.out, self._about, resume, report)
        self._load_data()
        self.model = Transformer(model_config, recipe, self.spread.dispatcher)
        self.model.init_weights(np.random.default_rng(np.random.SeedSequence(train_config.seed, spawn_key=(0,))))
        if train_config.init_from is not None:
            self._start_from(Path(train_config.init_from))
        self.optimizer, self._gradients = self.spread.prepare(self.model, train_config)
        self.step = self._saved = self._restore(resume)  # `_saved`: step of the newest checkpoint, 0 for none
        self.spread.barrier()  # every process has read what it needs
        if self.spread.is_root:
            self._take_over_folder()  # it is ours now: whatever was wrong with the call has been said

    def run(self) -> bool:
        """Train to the last step; True when done, False when interrupted (the run is saved and can be resumed).

        Raises ValueError when a loss or gradient is not finite, or a file can't be written: the last checkpoint stays.
        """
        try:
            self._train()
            if self.step >= self.train.steps:
                if self.spread.is_root:
                    save_pretrained(self.model, self.out / "final")
                return True
        except OSError as error:
            reason = f"{error.filename or self.out}: {error.strerror or error}"
            raise ValueError(f"{reason}; {self._last_good()}; mend this, then --resume goes on") from None
        self.report(f"stopped after step {self.step} and saved; the same command with --resume goes on")
        return False

    def _train(self) -> None:
        """The loop over the steps, up to the last one or Ctrl-C."""
        cfg = self.train
        keep_freed_memory()
        workers = workers_for(cfg.workers, cfg.shards)
        if not blas_is_controlled():
            self.report("this BLAS can't be held to one thread per worker: bits may depend on its threads")
        with ExitStack() as stack:
            run = stack.enter_context(worker_pool(workers))
            self._flops_per_second = 1e9 * self._about.environment["sgemm_gflops"]
            metrics = stack.enter_context(self._appending("metrics.jsonl"))
            experts = stack.enter_context(self._appending("experts.jsonl"))
            bar = stack.enter_context(
                tqdm(total=cfg.steps, initial=self.step, unit="step", disable=not self._progress, dynamic_ncols=True)
            )
            stack.enter_context(self._interrupts())
            flops_per_token = self._flops_per_token() if self.step < cfg.steps else 0
            while self.step < cfg.steps and not self._stop:
                line, load = self._one_step(run, flops_per_token)
                self._stop = self.spread.agree(self._stop)
                if self._is_due(cfg.eval_every):
                    self.spread.gather()
                    line["val_bits_per_byte"] = self.spread.from_root(lambda: self.evaluate(run))
                _append(experts, {"step": self.step, "load": load, "bias": self._biases()})
                _append(metrics, line)
                bar.update()
                bar.set_postfix_str(f"loss {line['main_loss']:.3f} nats, {line['tokens_per_second']:,.0f} tokens/s")
                if self._on_step:
                    self._on_step(self, self.step)
                if "val_bits_per_byte" in line and self._on_evaluation:
                    self._on_evaluation(self, self.step, line["val_bits_per_byte"])
                if self._is_due(cfg.checkpoint_every):
                    self._save()
            if self._stop and self.step != self._saved:
                self._save()

    def evaluate(self, run: Run = map) -> float:
        """Bits per byte on the whole validation text."""
        return bits_per_byte(self.model, *self._validation, batch_size=self.train.batch_size, run=run)

    def message(self, text: str) -> None:
        """Print without tearing the progress bar."""
        tqdm.write(text) if self._progress else self.report(text)

    def _one_step(self, run: Run, flops_per_token: float) -> tuple[dict[str, Any], list[list[int]]]:
        cfg, step = self.train, self.step + 1
        start = time.perf_counter()
        size = batch_size(cfg, step)
        position = sequences_before(cfg, step)
        shards = cut(*(batch := self._loader.batch(position, size)), cfg.shards)
        if self._trace_every and (step - 1) % self._trace_every == 0:
            self.spread.gather()
            self._routing.add(step, *route(self.model, *batch))
        try:
            on_shards, add_up = self.spread.step_run(run), self.spread.add_up
            result = train_step(self.model, self.optimizer, self._gradients, shards, cfg, step, on_shards, add_up)
        except NonFiniteError as error:
            raise ValueError(self._diagnosis(error, shards)) from None
        self.step = step
        speed = size * cfg.seq_len / (time.perf_counter() - start)
        return self._metrics_line(result, (position + size) * cfg.seq_len, speed, flops_per_token), (
            result.expert_load.tolist()
        )

    def _metrics_line(self, result: StepResult, tokens: int, speed: float, flops_per_token: float) -> dict[str, Any]:
        line: dict[str, Any] = {"step": self.step, "tokens": tokens}
        line |= {name: value for name, value in result._asdict().items() if name != "expert_load"}
        line["max_vio"] = float(max_vio(result.expert_load).mean()) if result.expert_load.size else 0.0
        line["tokens_per_second"] = speed
        line["mfu"] = speed * flops_per_token / self._flops_per_second
        return line

    def _is_due(self, every: int) -> bool:
        return self.step == self.train.steps or (every > 0 and self.step % every == 0)

    def _biases(self) -> list[list[float]]:
        E = self.config.n_routed_experts
        biases = (gate.e_score_correction_bias for gate in gates(self.model))
        return [[0.0] * E if b is None else b.tolist() for b in biases]

    def _save(self) -> None:
        self.spread.gather()
        self._saved = self.step
        if not self.spread.is_root:
            return
        folder = self.out / "checkpoints"
        position = sequences_before(self.train, self.step + 1)
        state = {"tokens": position * self.train.seq_len, "position": position, "seed": self.train.seed}
        save_checkpoint(folder, self.step, self.model, self.optimizer, state)
        self._routing.write(self.out / "routing.safetensors")
        prune(folder, self.train.keep)

    def _restore(self, resume: bool) -> int:
        found = checkpoints(self.out / "checkpoints") if resume else []
        step = 0
        if found:
            step = int(load_checkpoint(found[-1], self.model, self.optimizer)["step"])
            if step > self.train.steps:
                raise ValueError(f"{found[-1]} is at step {step}, beyond --steps {self.train.steps} (the total)")
            self.report(f"resuming after step {step} of {self.train.steps}")
        return step

    def _description(self, preset: str | None) -> Description:
        cfg = self.train
        gflops = round(sgemm_gflops(workers_for(cfg.workers, cfg.shards)), 1)
        machine = environment() | {"sgemm_gflops": gflops}
        return Description(self.config, cfg, machine, self.spread.description, preset)

    def _take_over_folder(self) -> None:
        """Write what is trained, and cut the lines of steps after ours."""
        self._about.write(self.out)
        for name in ("metrics.jsonl", "experts.jsonl"):
            if (self.out / name).exists():
                cut_after(self.out / name, self.step)
        if self._trace_every and (self.out / "routing.safetensors").exists():
            self._routing.resume(self.out / "routing.safetensors", self.step)

    def _start_from(self, source: Path) -> None:
        """Take over the weights of a finished run or a model directory; RoPE settings and lengths may differ."""
        stored = StoredModel(source / "final" if (source / "train.json").exists() else source)
        stored.check(self.model)
        stored.fill(self.model)

    def _appending(self, name: str) -> TextIO:
        """A file of the run folder to append lines to; nothing is kept of what another process than the root says."""
        path = self.out / name if self.spread.is_root else Path(os.devnull)
        return path.open("a", encoding="utf-8", newline="\n")

    def _load_data(self) -> None:
        tokenizer = ByteTokenizer()
        if self.config.vocab_size < tokenizer.vocab_size:
            raise ValueError(f"vocab_size={self.config.vocab_size} is below the {tokenizer.vocab_size} byte tokens")
        train, validation = split_documents(load_corpus(self.train.data).documents)
        self._loader = Loader(train, tokenizer, self.train.seq_len, self.train.seed)
        self._validation = validation_windows(validation, tokenizer, self.train.seq_len)

    def _flops_per_token(self) -> float:
        """Gemm FLOPs of forward and backward per token, counted on the first sequence."""
        with no_grad(), trace() as records:
            self.model.loss(*self._loader.batch(0, 1))
        return 3 * sum(record.flops for record in records) / self.train.seq_len

    def _diagnosis(self, error: NonFiniteError, shards: list[Any]) -> str:
        """Which op, or which parameter's gradient, was the first to be NaN or infinite."""
        found: list[str] = []

        def look(event: Any) -> None:
            if event.phase == "forward" and not all(np.isfinite(t.data).all() for t in event.outputs):
                found.append(f"{type(event.op).__name__} of {event.op._scope or 'the loss'}")

        with np.errstate(over="ignore", invalid="ignore"), no_grad(), observing(look):
            for shard in shards:
                self.model.loss(*shard)
        if not found:
            views = self.optimizer.flat.views(self._gradients[0].data)
            names = {v: f"{m.name}.{name}" for _, m in self.model.named_modules() for name, v in vars(m).items()
                     if isinstance(v, Parameter)}  # fmt: skip
            bad = [names[p] for p, view in views.items() if not np.isfinite(view).all()]
            found = [f"the gradient of {name}" for name in bad] or ["nothing now"]
        return (
            f"{error}: first not finite: {found[0]}; nothing was updated, {self._last_good()}; "
            "try a lower learning_rate"
        )

    def _last_good(self) -> str:
        kept = checkpoints(self.out / "checkpoints")
        return f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) asks the loop to stop after this step; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(signum: int, frame: object) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _append(stream: Any, line: dict[str, Any]) -> None:
    stream.write(json.dumps(line) + "\n")
    stream.flush()
