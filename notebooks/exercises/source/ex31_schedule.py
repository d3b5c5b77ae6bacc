# %% [markdown]
# # Exercise 31 · The schedule one forward, one backward
#
# **implement** · lesson 11, pipelines · 10 points · about 35 minutes
#
# A pipeline of `ranks` ranks works on `chunks` micro-batches. Write the schedule *one forward, one backward*: for each rank a
# list of ("F", 0, chunk) and ("B", 0, chunk), chunks from 0. A rank starts with as many forwards as there are ranks behind it, then
# alternates, and ends with the backwards that are left. It is validated, timed, and its memory counted.

# %%
import numpy as np

from minidsv3.exercises import check


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def one_forward_one_backward(ranks, chunks):
    """-> a list for each rank of (kind, 0, chunk)."""
    ### BEGIN SOLUTION
    rows = []
    for rank in range(ranks):
        warm_up = min(ranks - 1 - rank, chunks)
        row = [("F", 0, c) for c in range(warm_up)]
        for c in range(chunks - warm_up):
            row += [("F", 0, warm_up + c), ("B", 0, c)]
        rows.append(row + [("B", 0, c) for c in range(chunks - warm_up, chunks)])
    return rows
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("schedule", one_forward_one_backward)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "complete", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("schedule", one_forward_one_backward, "complete", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "runs", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("schedule", one_forward_one_backward, "runs", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "memory", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("schedule", one_forward_one_backward, "memory", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "bubble", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("schedule", one_forward_one_backward, "bubble", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("schedule", one_forward_one_backward, "golden", seed=seed)
