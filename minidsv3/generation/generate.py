"""`generate`: continue prompts with a latent cache, greedily or by sampling, with or without speculation.

A prompt is read in chunks into the cache (prefill); then each pass of the model adds one token to every sequence, or
several when the MTP modules draft and the main model verifies (`generation.speculative`). Prompts may have different
lengths. Speculation handles one sequence after the other, because each accepts a different number of drafts.

The passes are those of `Transformer.decode`, by way of `generation.decoder`, which makes single tokens cheap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..autograd import Array
from ..model.transformer import Transformer
from .cache import PAGE, LatentCache
from .decoder import Decoder
from .sampler import choose
from .speculative import Sampler, speculate

PREFILL = 512  # tokens of a prompt that pass the model at once
LONGEST_PAGE = 8192  # tokens of the cache that lie in one array, so that attention needs no more than one product


@dataclass
class Generation:
    """What `generate` returns."""

    tokens: list[Array]  # int64 [n] per prompt, without the prompt, stop sequence excluded
    seconds: float
    cache_bytes_per_token: float
    main_passes: int  # passes of the main model, prefill included
    accepted_by_depth: list[int] = field(default_factory=list)  # drafts of each MTP depth that the model accepted
    drafted_by_depth: list[int] = field(default_factory=list)  # drafts that it looked at

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all prompts together, per second."""
        return sum(map(len, self.tokens)) / max(self.seconds, 1e-9)


class Output:
    """One sequence's new tokens: counts them, watches for stop sequences, and streams what is certain to stay."""

    def __init__(self, limit: int, stop: list[list[int]], stream: Callable[[int], object] | None) -> None:
        self.tokens: list[int] = []
        self.done = limit == 0
        self._limit, self._stop, self._stream, self._streamed = limit, stop, stream, 0

    def add(self, token: int) -> None:
        """Take one more token, unless the sequence is done."""
        if self.done:
            return
        self.tokens.append(token)
        for stop in self._stop:
            if self.tokens[-len(stop) :] == stop:
                del self.tokens[-len(stop) :]
                self.done = True
                break
        self.done = self.done or len(self.tokens) == self._limit
        held_back = 0 if self.done else self._possible_stop()
        while self._stream and self._streamed < len(self.tokens) - held_back:
            self._stream(self.tokens[self._streamed])
            self._streamed += 1

    def _possible_stop(self) -> int:
        """Tokens at the end that may be the beginning of a stop sequence."""
        longest = 0
        for stop in self._stop:
            for n in range(1, min(len(stop), len(self.tokens) + 1)):
                if self.tokens[-n:] == stop[:n]:
                    longest = max(longest, n)
        return longest


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Array],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    rng: np.random.Generator | None = None,
    stop: Sequence[Sequence[int]] | None = None,
    speculative: bool = False,
    stream: Callable[[int, int], object] | None = None,
) -> Generation:
    """Continue every prompt by up to `max_new_tokens` tokens.

    Parameters
    ----------
    prompts : list of 1-D int sequences, of any lengths >= 1
    temperature : float
        0 is greedy; above 0 draws and needs `rng`.
    top_p : float in (0, 1]
        Draw only from the most likely tokens that together have this probability.
    stop : list of token sequences, optional
        A sequence ends before the first of these that it would contain.
    speculative : bool
        Let the MTP modules draft; the output is what it would be without (greedy), or has the same distribution.
    stream : function (prompt index, token), optional
        Called once for each token of the result, in order, as soon as it is certain.

    Raises
    ------
    ValueError
        temperature > 0 without rng; speculative without MTP modules; an empty prompt, prompt list or stop sequence; a
        token outside the vocabulary.
    """
    rows, stops = _checked(model, prompts, max_new_tokens, temperature, top_p, rng, stop, speculative)
    outputs = [
        Output(max_new_tokens, stops, None if stream is None else lambda token, i=i: stream(i, token))  # type: ignore[misc]
        for i in range(len(rows))
    ]
    depth = model.config.num_nextn_predict_layers if speculative else 0
    decoder, longest = Decoder(model), max(map(len, rows)) + max_new_tokens + depth
    page = min(max(longest, PAGE), LONGEST_PAGE)
    result = Generation([], 0.0, 0.0, 0, [0] * depth, [0] * depth)
    start = time.perf_counter()
    if speculative:
        for row, output in zip(rows, outputs):
            speculate(model, decoder, page, row, output, result, (temperature, top_p, rng))
    else:
        _decode(model, decoder, page, rows, outputs, result, (temperature, top_p, rng))
    result.seconds = time.perf_counter() - start
    result.tokens = [np.array(output.tokens, dtype=np.int64) for output in outputs]
    return result


def prefill(decoder: Decoder, rows: Sequence[Array], cache: LatentCache) -> Iterator[tuple[Array, Array]]:
    """Read prompts into an empty cache; yields each chunk's hidden states [B, n, D] and valid counts int [B]."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    padded = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for row, tokens in zip(padded, rows):
        row[: len(tokens)] = tokens
    for a in range(0, padded.shape[1], PREFILL):
        chunk = padded[:, a : a + PREFILL]
        counts = np.clip(lengths - a, 0, chunk.shape[1])
        h = decoder.decode(chunk, cache)
        cache.extend(counts)
        yield h, counts


def _decode(
    model: Transformer, decoder: Decoder, page: int, rows: list[Array], outputs: list[Output], result: Generation,
    sampler: Sampler,
) -> None:  # fmt: skip
    """One token for every sequence at each pass; sequences that are done ride along until all are."""
    cache = LatentCache(model.config, len(rows), model.norm.weight.dtype, page=page)
    last = np.empty((len(rows), model.config.hidden_size), dtype=model.norm.weight.dtype)
    for h, counts in prefill(decoder, rows, cache):
        result.main_passes += 1
        for b in np.flatnonzero(counts).tolist():
            last[b] = h[b, counts[b] - 1]
    while not all(output.done for output in outputs):
        logits = decoder.head(last)
        tokens = np.zeros((len(rows), 1), dtype=np.int64)
        for b, output in enumerate(outputs):
            if not output.done:
                tokens[b] = choose(logits[b], *sampler)
                output.add(int(tokens[b, 0]))
        if not all(output.done for output in outputs):
            last = decoder.decode(tokens, cache)[:, 0]
            cache.extend(1)
            result.main_passes += 1
    result.cache_bytes_per_token = cache.bytes_per_token


def _checked(
    model: Transformer, prompts: Sequence[Sequence[int] | Array], max_new_tokens: int, temperature: float, top_p: float,
    rng: np.random.Generator | None, stop: Sequence[Sequence[int]] | None, speculative: bool,
) -> tuple[list[Array], list[list[int]]]:  # fmt: skip
    """Prompts as arrays and stops as lists; ValueError for anything that could not be continued."""
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows:
        raise ValueError("no prompts: give at least one")
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu":
            raise ValueError(f"prompt {i} must be a 1-D sequence of at least one token, got {row.dtype} {row.shape}")
        if not 0 <= int(row.min()) <= int(row.max()) < model.config.vocab_size:
            raise ValueError(f"prompt {i} has a token outside the vocabulary of {model.config.vocab_size}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative")
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature} must be >= 0 and top_p={top_p} in (0, 1]")
    if temperature > 0 and rng is None:
        raise ValueError(f"temperature={temperature} draws at random: give an rng")
    if speculative and not model.mtp:
        raise ValueError("speculative decoding needs MTP modules: num_nextn_predict_layers is 0")
    stops = [[int(t) for t in sequence] for sequence in stop or ()]
    if not all(stops):
        raise ValueError("a stop sequence is empty")
    return rows, stops
