"""The sequence-wise balance loss as an op, Eq. 17-20 (lesson 05)."""

from typing import Any

from ..ops.loss import SequenceBalanceLossFunction
from .any_op import sequence_loss_cases
from .exercise import Exercise
from .golden import golden_op
from .gradients import op_properties


def _enter(submission: Any, parts: Any) -> None:
    parts.replacements.append((SequenceBalanceLossFunction, submission))


EXERCISE = Exercise(
    title="the sequence-wise balance loss and its gradient",
    kind="I",
    lesson=5,
    minutes=40,
    properties=(
        *op_properties(
            SequenceBalanceLossFunction,
            sequence_loss_cases,
            points=(2, 2, 5),
            hints=(
                "f and P per sequence, f = counts E / (K S), P = mean of scores normalised over all experts; then the "
                "mean over sequences of sum f P",
                "counts are integers: f must get the dtype of the scores; so must the loss: "
                "np.asarray(loss, dtype=scores.dtype)",
                "f counts and has no gradient; s / sum(s) has one through the sum too",
            ),
        ),
        golden_op("sequence_loss", "scores", "topk_idx batch", "loss", "dscores"),
    ),
    enter=_enter,
)
