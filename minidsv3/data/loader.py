"""From documents to batches: which bytes are for training, and which window of tokens comes when.

`split_documents` keeps the end of every document for validation, so that training and validation have the same
authors and the same subject, and no window of one overlaps the other.

`Loader` deals the training tokens. The stream is a ring: each document behind a boundary id, the last followed by
the first. An epoch cuts it from a random starting point into windows that do not overlap, and deals them in random
order. Both draws come from ``default_rng([seed, epoch])``, so the batch at a position is a pure function of (seed,
position): to resume a run, its position is all that has to be kept. At most one window's worth of tokens, in another
place each epoch, is left out.

`validation_windows` predicts every byte of the validation text once, so that losses of tokenizers with different
vocabularies compare as bits per byte.

What is simplified against the report (section 4.1): documents are packed as there, and attention runs across their
boundaries as there; but nothing is shuffled between files or streamed, the whole corpus is in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .tokenizer import Tokenizer

IGNORED = -100  # target where there is nothing to predict; the loss leaves it out
_LEAST_VALIDATION = 200_000  # bytes; below this the loss on a validation text wavers by more than a step of training
_CONTEXT = 64  # bytes kept before a validation text, of which its first prediction sees the last token


def split_documents(documents: Sequence[bytes]) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """Training text and validation text: the beginning and the end of each document.

    The end is 5 % of each document, or more where the whole would stay below 200,000 bytes; a corpus below 400,000
    bytes gives 10 %.

    Returns
    -------
    train : list of bytes
    validation : list of (context, text)
        `text` is what to predict; `context` the up to 64 bytes before it. No cut is inside a UTF-8 character.
    """
    total = sum(len(document) for document in documents)
    held_out = -(-total // 10) if total < 2 * _LEAST_VALIDATION else max(-(-total // 20), _LEAST_VALIDATION)
    train, validation = [], []
    for document in documents:
        at_least = -(-len(document) * held_out // max(total, 1))  # rounded up, so that the sum is not below held_out
        cut = _character_start(document, len(document) - at_least)
        begin = _character_start(document, max(0, cut - _CONTEXT))
        train.append(document[:cut])
        validation.append((document[begin:cut], document[cut:]))
    return [text for text in train if text], [pair for pair in validation if pair[1]]


def _character_start(text: bytes, position: int) -> int:
    """The nearest position at or before `position` that does not cut a UTF-8 character (10xxxxxx continues one)."""
    while 0 < position < len(text) and text[position] & 0xC0 == 0x80:
        position -= 1
    return position


def token_stream(documents: Sequence[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one row of ids, a boundary before each; uint16 where the vocabulary fits, else uint32."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    boundary = np.array([tokenizer.boundary], dtype=dtype)
    pieces = [piece for document in documents for piece in (boundary, tokenizer.encode(document).astype(dtype))]
    return np.concatenate([np.zeros(0, dtype=dtype), *pieces])


class _Epoch(NamedTuple):
    number: int
    first: int  # where on the ring the cutting begins
    order: np.ndarray  # window_of_turn


class Loader:
    """Deals windows of `seq_len` tokens and their next tokens, in an order that the seed fixes.

    Parameters
    ----------
    documents : sequence of bytes
    tokenizer : Tokenizer
    seq_len : int
    seed : int

    Attributes
    ----------
    num_tokens : int
        Tokens of the ring, boundaries included.
    windows_per_epoch : int

    Raises
    ------
    ValueError
        The text is shorter than one sequence and the token after it.
    """

    def __init__(self, documents: Sequence[bytes], tokenizer: Tokenizer, seq_len: int, seed: int) -> None:
        if seq_len <= 0:
            raise ValueError(f"seq_len={seq_len} is not positive")
        if seed < 0:
            raise ValueError(f"seed={seed} is negative")
        stream = token_stream(documents, tokenizer)
        if len(stream) < seq_len + 1:
            raise ValueError(f"the text has {len(stream)} tokens, one sequence needs seq_len + 1 = {seq_len + 1}")
        self.seq_len, self.seed, self.num_tokens = seq_len, seed, len(stream)
        self.windows_per_epoch = len(stream) // seq_len
        self._ring = np.concatenate([stream, stream[:seq_len]])  # so that a window at the seam is one slice
        self._epoch = self._plan(0)

    def batch(self, position: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The `batch_size` sequences that follow the first `position` ones.

        Parameters
        ----------
        position : int
            Sequences dealt before, all epochs together.
        batch_size : int

        Returns
        -------
        tokens_in, targets : ndarray, int64, shape [B, S]
            ``targets[:, i]`` is the token after ``tokens_in[:, i]``. A batch may run from one epoch into the next.
        """
        if position < 0 or batch_size <= 0:
            raise ValueError(f"position={position} must be 0 or more, batch_size={batch_size} positive")
        starts = [self._start(turn) for turn in range(position, position + batch_size)]
        index = np.array(starts, dtype=np.int64)[:, None] + np.arange(self.seq_len + 1, dtype=np.int64)
        tokens = self._ring[index].astype(np.int64)  # [B, S + 1]
        return tokens[:, :-1], tokens[:, 1:]

    def _start(self, turn: int) -> int:
        """Where on the ring the window of this turn begins."""
        number, turn = divmod(turn, self.windows_per_epoch)
        epoch = self._epoch
        if epoch.number != number:
            epoch = self._epoch = self._plan(number)  # kept for speed only: the plan depends on seed and number alone
        return (epoch.first + int(epoch.order[turn]) * self.seq_len) % self.num_tokens

    def _plan(self, number: int) -> _Epoch:
        rng = np.random.default_rng([self.seed, number])
        return _Epoch(number, int(rng.integers(self.num_tokens)), rng.permutation(self.windows_per_epoch))


def validation_windows(
    validation: Sequence[tuple[bytes, bytes]], tokenizer: Tokenizer, seq_len: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Windows that predict every token of the validation texts exactly once.

    Each window continues where the one before stopped predicting; it sees nothing before its first input, which is
    the last token of the context (a boundary where the context is empty) or of the window before. The end of a text's
    last window is padded with boundary ids, and its targets there are `IGNORED`.

    Returns
    -------
    tokens_in, targets : ndarray, int64, shape [N, S]
    num_bytes : int
        Bytes that the targets stand for: total loss in nats / (ln 2 * num_bytes) is bits per byte.

    Raises
    ------
    ValueError
        There is no validation text.
    """
    if seq_len <= 0:
        raise ValueError(f"seq_len={seq_len} is not positive")
    num_bytes = sum(len(text) for _, text in validation)
    if num_bytes == 0:
        raise ValueError("there is no validation text")
    windows = [_windows_of_text(context, text, tokenizer, seq_len) for context, text in validation if text]
    inputs, targets = zip(*windows)
    return np.concatenate(inputs), np.concatenate(targets), num_bytes


def _windows_of_text(context: bytes, text: bytes, tokenizer: Tokenizer, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = tokenizer.encode(text)
    before = tokenizer.encode(context)[-1:] if context else np.array([tokenizer.boundary], dtype=np.int64)
    num_windows = -(-len(tokens) // seq_len)
    inputs = np.full(num_windows * seq_len, tokenizer.boundary, dtype=np.int64)
    targets = np.full(num_windows * seq_len, IGNORED, dtype=np.int64)
    inputs[: len(tokens)] = np.concatenate([before, tokens[:-1]])
    targets[: len(tokens)] = tokens
    return inputs.reshape(num_windows, seq_len), targets.reshape(num_windows, seq_len)
