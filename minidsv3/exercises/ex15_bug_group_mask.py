"""Find the bug: node-limited routing (lesson 04).

Row 4 of the list of errors: masked groups filled with 0 (DeepSeek-V3#741, vllm#13474, sglang#3705, flashinfer#2168);
row 5: the group's score is its best expert instead of its two best (vllm#13474, Megatron#1441).
"""

from typing import Any

import numpy as np

from .planted import Bug, find_the_bug

CORRECT = '''def group_limited_experts(choice, top_k, n_group, topk_group):
    """Experts of each token from biased scores choice [T, E] -> int64 [T, K], ascending."""
    T, E = choice.shape
    grouped = choice.reshape(T, n_group, E // n_group)
    best_two = np.sort(grouped, axis=2)[:, :, -2:]
    group_score = best_two.sum(axis=2)
    kept = np.argsort(-group_score, axis=1, kind="stable")[:, :topk_group]
    mask = np.zeros((T, n_group), dtype=bool)
    np.put_along_axis(mask, kept, True, axis=1)
    masked = np.where(mask[:, :, None], grouped, -np.inf)
    order = np.argsort(-masked.reshape(T, E), axis=1, kind="stable")
    return np.sort(order[:, :top_k], axis=1)'''

BUGS = (
    Bug(
        "    masked = np.where(mask[:, :, None], grouped, -np.inf)",
        "    masked = np.where(mask[:, :, None], grouped, 0.0)",
        "row 4: 0 beats every negative score",
    ),
    Bug(
        "    best_two = np.sort(grouped, axis=2)[:, :, -2:]",
        "    best_two = np.sort(grouped, axis=2)[:, :, -1:]",
        "row 5: the best expert alone decides for its group",
    ),
    Bug(
        "    group_score = best_two.sum(axis=2)",
        "    group_score = grouped.sum(axis=2)",
        "row 5: the whole group counts, so many middling experts beat two good ones",
    ),
    Bug(
        '    kept = np.argsort(-group_score, axis=1, kind="stable")[:, :topk_group]',
        '    kept = np.argsort(-group_score, axis=1, kind="stable")[:, :top_k]',
        "experts per token for groups per token: the node limit is gone",
    ),
)


def cases(rng: np.random.Generator) -> list[dict[str, Any]]:
    small = ([-3.0, -4.0, -2.0, -9.0, -1.0, -8.0], [0.9, 0.1, 0.2, 0.7, 0.6, 0.5, 0.65, 0.6, 0.64])
    out = [dict(choice=np.array([row]), top_k=2, n_group=3, topk_group=1) for row in small]
    for shift in (0.0, -3.0):
        choice = rng.standard_normal((7, 12)) + shift
        out.append(dict(choice=choice, top_k=3, n_group=4, topk_group=2))
    return out


EXERCISE = find_the_bug(
    "find the bug: node-limited routing",
    4,
    20,
    CORRECT,
    BUGS,
    cases,
    "biases make scores negative; a group is as good as its two best experts together",
)
