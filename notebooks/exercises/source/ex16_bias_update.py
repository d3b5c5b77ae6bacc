# %% [markdown]
# # Exercise 16 · Balancing without an auxiliary loss: the bias rule
#
# **implement** · lesson 05, balancing · 10 points · about 15 minutes
#
# DeepSeek-V3 balances its experts without an auxiliary loss (section 2.1.2): after each step the bias of an expert that got
# more than the mean load goes down by `speed`, that of one that got less goes up by `speed`, and nothing else.
#
# Return a new array; the old one stays as it is.

# %%
import numpy as np

from minidsv3.exercises import check, use


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def update_bias(bias, load, speed):
    """bias float32 [E], load int [E], speed -> float32 [E]."""
    ### BEGIN SOLUTION
    return bias + np.float32(speed) * np.sign(load.mean() - load).astype(np.float32)
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("bias_update", update_bias)

# %% [markdown]
# **Use yours.** Once all properties hold, the smallest model trains twenty steps with your code inside.

# %%
use("bias_update", update_bias)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "direction", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bias_update", update_bias, "direction", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "size", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bias_update", update_bias, "size", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "balanced", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bias_update", update_bias, "balanced", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "adds_up", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bias_update", update_bias, "adds_up", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bias_update", update_bias, "golden", seed=seed)
