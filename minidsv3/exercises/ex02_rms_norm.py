"""RMSNorm as an op: forward and backward (lesson 01)."""

from typing import Any

from ..ops.norm import RMSNormFunction
from .any_op import rms_norm_cases
from .exercise import Exercise
from .golden import golden_op
from .gradients import op_properties


def _enter(submission: Any, parts: Any) -> None:
    parts.replacements.append((RMSNormFunction, submission))


EXERCISE = Exercise(
    title="RMSNorm, forward and backward",
    kind="I",
    lesson=1,
    minutes=25,
    properties=(
        *op_properties(
            RMSNormFunction,
            rms_norm_cases,
            points=(2, 2, 5),
            hints=(
                "y = w x / sqrt(mean(x^2) + eps), the mean over the last axis, eps inside the root",
                "np.sqrt of a float32 plus a Python float stays float32; dw has the shape of w, [D]",
                "dx = r (g - x r^2 mean(g x)) with g = w dy: x acts through the root too; dw sums over all rows",
            ),
        ),
        golden_op("rms_norm", "x w", "eps", "y", "dx dw"),
    ),
    enter=_enter,
)
