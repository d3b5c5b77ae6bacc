# %% [markdown]
# # Exercise 03 · Cross-entropy over the vocabulary, forward and backward
#
# **implement** · lesson 01, reverse mode by hand · 10 points · about 25 minutes
#
# The loss of a language model: the mean over valid targets of $-\log \mathrm{softmax}(z)_t = \log\sum_v e^{z_v} - z_t$.
# A target of -100 is ignored; without any valid target the loss and its gradient are 0.
#
# `forward(logits, targets=...)` takes logits [N, V] and targets int [N], and returns an array without axes (`np.asarray(loss,
# dtype=logits.dtype)`). Logits may be in the hundreds: no overflow, please. `backward(dy)` gets one number.

# %%
import numpy as np

from minidsv3.autograd import Function
from minidsv3.exercises import check, use


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
class CrossEntropy(Function):
    """logits [N, V], targets int [N] -> scalar, in nats."""

    def forward(self, logits, *, targets):
        ### BEGIN SOLUTION
        valid = targets != -100
        safe = np.where(valid, targets, 0)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        count = max(int(valid.sum()), 1)
        rows = np.arange(len(logits))
        self.save(log_p, safe, valid)
        self._count = count
        return np.asarray(-(log_p[rows, safe] * valid).sum() / count, dtype=logits.dtype)
        ### END SOLUTION

    def backward(self, dy):
        ### BEGIN SOLUTION
        log_p, safe, valid = self.saved
        dlogits = np.exp(log_p)
        dlogits[np.arange(len(log_p)), safe] -= 1
        dlogits *= (valid * (dy / self._count)).astype(log_p.dtype)[:, None]
        return dlogits
        ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("cross_entropy", CrossEntropy)

# %% [markdown]
# **Use yours.** Once all properties hold, the smallest model trains twenty steps with your code inside.

# %%
use("cross_entropy", CrossEntropy)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "values", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("cross_entropy", CrossEntropy, "values", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "types", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("cross_entropy", CrossEntropy, "types", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "gradients", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("cross_entropy", CrossEntropy, "gradients", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("cross_entropy", CrossEntropy, "golden", seed=seed)
