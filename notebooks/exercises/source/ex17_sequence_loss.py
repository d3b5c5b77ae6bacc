# %% [markdown]
# # Exercise 17 · The sequence-wise balance loss and its gradient
#
# **implement** · lesson 05, balancing · 10 points · about 40 minutes
#
# The small auxiliary loss inside each sequence (Eq. 17-20, without alpha): with K of E experts chosen for each of S tokens,
# $f_i = \frac{E}{K S} \sum_t [i \text{ chosen for } t]$, $P_i = \frac1S \sum_t s_{i,t} / \sum_j s_{j,t}$, and the loss is $\sum_i f_i P_i$. Over
# several sequences: the mean. f counts, so no gradient passes it.
#
# `forward(scores, topk_idx=..., batch=...)`: scores [batch S, E], topk_idx [batch S, K] -> an array without axes.

# %%
import numpy as np

from minidsv3.autograd import Function
from minidsv3.exercises import check, use


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
class SequenceLoss(Function):
    """scores [B S, E], topk_idx [B S, K], batch B -> scalar."""

    def forward(self, scores, *, topk_idx, batch):
        ### BEGIN SOLUTION
        T, E = scores.shape
        S, K = T // batch, topk_idx.shape[1]
        chosen = np.zeros((T, E), dtype=scores.dtype)
        np.put_along_axis(chosen, topk_idx, 1, axis=1)
        f = chosen.reshape(batch, S, E).sum(axis=1) * scores.dtype.type(E / (K * S))
        total = scores.sum(axis=1, keepdims=True)
        P = (scores / total).reshape(batch, S, E).mean(axis=1)
        self.save(f, scores, total)
        return np.asarray((f * P).sum() / batch, dtype=scores.dtype)
        ### END SOLUTION

    def backward(self, dy):
        ### BEGIN SOLUTION
        f, scores, total = self.saved
        dshare = np.repeat(f, len(scores) // len(f), axis=0) * (dy / len(scores))
        share = scores / total
        return ((dshare - (dshare * share).sum(axis=1, keepdims=True)) / total).astype(scores.dtype)
        ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("sequence_loss", SequenceLoss)

# %% [markdown]
# **Use yours.** Once all properties hold, the smallest model trains twenty steps with your code inside.

# %%
use("sequence_loss", SequenceLoss)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "values", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("sequence_loss", SequenceLoss, "values", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "types", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("sequence_loss", SequenceLoss, "types", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "gradients", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("sequence_loss", SequenceLoss, "gradients", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("sequence_loss", SequenceLoss, "golden", seed=seed)
