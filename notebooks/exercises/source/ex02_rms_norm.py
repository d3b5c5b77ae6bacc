# %% [markdown]
# # Exercise 02 · RMSNorm, forward and backward
#
# **implement** · lesson 01, reverse mode by hand · 10 points · about 25 minutes
#
# RMSNorm divides a vector by its root mean square and scales each channel: $y = w\,x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$,
# over the last axis of x [..., D], with w [D].
#
# Write it as an op: `forward` takes arrays, keeps with `self.save(...)` what `backward` needs, and returns y; `backward`
# takes dy, the gradient of the loss by y, and returns the gradients of x and of w. Float32 in, float32 out.

# %%
import numpy as np

from minidsv3.autograd import Function
from minidsv3.exercises import check, use


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
class RMSNorm(Function):
    """x [..., D], w [D] -> [..., D]."""

    def forward(self, x, w, *, eps):
        ### BEGIN SOLUTION
        r = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps))  # [..., 1]
        self.save(x, w, r)
        return w * x * r
        ### END SOLUTION

    def backward(self, dy):
        ### BEGIN SOLUTION
        x, w, r = self.saved
        g = dy * w
        dx = r * (g - x * r * r * (g * x).mean(axis=-1, keepdims=True))
        dw = (dy * x * r).reshape(-1, x.shape[-1]).sum(axis=0)
        return dx, dw
        ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("rms_norm", RMSNorm)

# %% [markdown]
# **Use yours.** Once all properties hold, the smallest model trains twenty steps with your code inside.

# %%
use("rms_norm", RMSNorm)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "values", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("rms_norm", RMSNorm, "values", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "types", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("rms_norm", RMSNorm, "types", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "gradients", "locked": true, "points": 5, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("rms_norm", RMSNorm, "gradients", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("rms_norm", RMSNorm, "golden", seed=seed)
