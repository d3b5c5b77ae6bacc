# %% [markdown]
# # Exercise 13 · Dispatch and combine: rows to their experts and back
#
# **implement** · lesson 04, DeepSeekMoE routing · 10 points · about 35 minutes
#
# Every token goes to K experts. For one matrix product an expert its rows must stand side by side: copy token rows so that
# they are sorted by expert (tokens in order within one), and later bring the results back.
#
# * `plan(topk_idx, E)`: topk_idx int [T, K] -> `rows_per_expert` int64 [E], `token_of_row` int64 [T K] (which token row n is a
#   copy of), `row_of_slot` int64 [T, K] (which row slot (t, k) became).
# * `combine(rows, weights, row_of_slot)`: rows [T K, D], weights [T, K] -> [T, D], each token's weighted sum.

# %%
import numpy as np

from minidsv3.exercises import check, use


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def plan(topk_idx, E):
    """int [T, K] -> (rows_per_expert [E], token_of_row [T K], row_of_slot [T, K])."""
    ### BEGIN SOLUTION
    T, K = topk_idx.shape
    slot_of_row = np.argsort(topk_idx.reshape(-1), kind="stable")
    row_of_slot = np.empty(T * K, dtype=np.int64)
    row_of_slot[slot_of_row] = np.arange(T * K)
    return np.bincount(topk_idx.reshape(-1), minlength=E), slot_of_row // K, row_of_slot.reshape(T, K)
    ### END SOLUTION


def combine(rows, weights, row_of_slot):
    """rows [T K, D], weights [T, K], row_of_slot [T, K] -> [T, D]."""
    ### BEGIN SOLUTION
    return np.einsum("tk,tkd->td", weights, rows[row_of_slot])
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("dispatch", dict(plan=plan, combine=combine))

# %% [markdown]
# **Use yours.** Once all properties hold, the smallest model trains twenty steps with your code inside.

# %%
use("dispatch", dict(plan=plan, combine=combine))

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "counts", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("dispatch", dict(plan=plan, combine=combine), "counts", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "order", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("dispatch", dict(plan=plan, combine=combine), "order", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "inverse", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("dispatch", dict(plan=plan, combine=combine), "inverse", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "combine", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("dispatch", dict(plan=plan, combine=combine), "combine", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("dispatch", dict(plan=plan, combine=combine), "golden", seed=seed)
