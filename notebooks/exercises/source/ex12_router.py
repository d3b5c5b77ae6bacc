# %% [markdown]
# # Exercise 12 · A router with groups, bias and ties
#
# **implement** · lesson 04, DeepSeekMoE routing · 10 points · about 35 minutes
#
# DeepSeek-V3's selection (section 2.1.2): a token chooses by score + bias. With groups it first keeps the `topk_group` groups
# whose **two best** experts have the largest sum, then takes the `top_k` best experts inside them. Ties go to the lowest
# index. The bias may make every number negative.

# %%
import numpy as np

from minidsv3.exercises import check, use


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def select(scores, bias, *, top_k, n_group, topk_group):
    """scores [T, E], bias [E] -> int64 [T, top_k], ascending in each row."""
    ### BEGIN SOLUTION
    T, E = scores.shape
    choice = (scores + bias).reshape(T, n_group, E // n_group)
    group_score = np.sort(choice, axis=2)[:, :, -2:].sum(axis=2)
    kept = np.argsort(-group_score, axis=1, kind="stable")[:, :topk_group]
    allowed = np.zeros((T, n_group), dtype=bool)
    np.put_along_axis(allowed, kept, True, axis=1)
    masked = np.where(allowed[:, :, None], choice, -np.inf).reshape(T, E)
    return np.sort(np.argsort(-masked, axis=1, kind="stable")[:, :top_k], axis=1)
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("router", select)

# %% [markdown]
# **Use yours.** Once all properties hold, the smallest model trains twenty steps with your code inside.

# %%
use("router", select)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "plain", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("router", select, "plain", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "ties", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("router", select, "ties", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "bias", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("router", select, "bias", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "groups", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("router", select, "groups", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "negative", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("router", select, "negative", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("router", select, "golden", seed=seed)
