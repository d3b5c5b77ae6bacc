"""Cross-entropy with ignored targets as an op: forward and backward (lesson 01)."""

from typing import Any

from ..ops.loss import CrossEntropyFunction
from .any_op import cross_entropy_cases
from .exercise import Exercise
from .golden import golden_op
from .gradients import op_properties


def _enter(submission: Any, parts: Any) -> None:
    class Flat(submission):  # the model's logits are [B, S, V]
        def forward(self, logits: Any, *, targets: Any) -> Any:
            self._leading = logits.shape
            return super().forward(logits.reshape(-1, logits.shape[-1]), targets=targets.reshape(-1))

        def backward(self, dy: Any) -> Any:
            return super().backward(dy).reshape(self._leading)

    parts.replacements.append((CrossEntropyFunction, Flat))


EXERCISE = Exercise(
    title="cross-entropy over the vocabulary, forward and backward",
    kind="I",
    lesson=1,
    minutes=25,
    properties=(
        *op_properties(
            CrossEntropyFunction,
            cross_entropy_cases,
            points=(2, 2, 5),
            hints=(
                "mean over the targets that are not -100, 0 if there are none; subtract the row's maximum before exp",
                "the loss is a 0-d array of the logits' dtype: np.asarray(loss, dtype=logits.dtype)",
                "(softmax - one hot) / number of valid targets, times dy; ignored rows get zero",
            ),
        ),
        golden_op("cross_entropy", "logits", "targets", "loss", "dlogits"),
    ),
    enter=_enter,
)
