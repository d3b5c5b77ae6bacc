# %% [markdown]
# # Exercise 05 · RoPE in both layouts, and the permutation between them
#
# **implement** · lesson 02, RoPE and YaRN · 10 points · about 30 minutes
#
# RoPE turns pairs of channels by an angle: $(a, b) \to (a\cos\varphi - b\sin\varphi,\; a\sin\varphi + b\cos\varphi)$. Which channels form
# pair j is a convention: the neighbours (2j, 2j+1) in DeepSeek's released weights (`interleave`), or (j, j + d/2), the
# half-split layout. Mixing them up does not crash; it decodes nonsense.
#
# * `rotate(x, angles, interleave)`: x [S, d], angles [S, d/2] -> [S, d], in x's dtype.
# * `permutation(d)`: int [d] such that turning `x[:, permutation]` half-split equals turning x with neighbours and then
#   taking the same permutation.

# %%
import numpy as np

from minidsv3.exercises import check, use


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def rotate(x, angles, interleave):
    """x [S, d], angles [S, d/2] -> [S, d]."""
    ### BEGIN SOLUTION
    half = x.shape[1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleave else (slice(0, half), slice(half, None))
    cos, sin = np.cos(angles), np.sin(angles)
    y = np.empty_like(x)
    y[:, first] = x[:, first] * cos - x[:, second] * sin
    y[:, second] = x[:, first] * sin + x[:, second] * cos
    return y
    ### END SOLUTION


def permutation(d):
    """int [d]."""
    ### BEGIN SOLUTION
    return np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)])
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("rope", dict(rotate=rotate, permutation=permutation))

# %% [markdown]
# **Use yours.** Once all properties hold, the smallest model trains twenty steps with your code inside.

# %%
use("rope", dict(rotate=rotate, permutation=permutation))

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "neighbours", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("rope", dict(rotate=rotate, permutation=permutation), "neighbours", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "halves", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("rope", dict(rotate=rotate, permutation=permutation), "halves", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "relative", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("rope", dict(rotate=rotate, permutation=permutation), "relative", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "permutation", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("rope", dict(rotate=rotate, permutation=permutation), "permutation", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "types", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("rope", dict(rotate=rotate, permutation=permutation), "types", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("rope", dict(rotate=rotate, permutation=permutation), "golden", seed=seed)
