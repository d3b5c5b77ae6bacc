# %% [markdown]
# # Exercise 32 · Bubbles of four schedules
#
# **account** · lesson 11, pipelines · 10 points · about 20 minutes
#
# Times of one chunk on one rank: F forward, B backward, W the weight part of it, FB a forward and a backward that overlap
# (V3 report, Table 2).

# %%
from minidsv3.exercises import check

# %% nbgrader={"grade": false, "grade_id": "given", "locked": true, "schema_version": 3, "solution": false, "task": false}
GIVEN = {
    "ranks": 8,
    "chunks": 20,
    "F": 1.0,
    "B": 2.0,
    "W": 0.8,
    "FB": 2.8,
}
VARIANT = GIVEN


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def bubble_1f1b():
    """idle time of a rank, one forward one backward (B is the whole backward) (units of time)."""
    ### BEGIN SOLUTION
    return (8 - 1) * (1.0 + 2.0)
    ### END SOLUTION


def bubble_zb1p():
    """idle time of a rank, zero bubble (units of time)."""
    ### BEGIN SOLUTION
    return (8 - 1) * (1.0 + 2.0 - 2 * 0.8)
    ### END SOLUTION


def bubble_dualpipe():
    """idle time of a rank, DualPipe (units of time)."""
    ### BEGIN SOLUTION
    return (8 // 2 - 1) * (2.8 + 2.0 - 3 * 0.8)
    ### END SOLUTION


def share_1f1b():
    """idle share of the whole step, one forward one backward (percent)."""
    ### BEGIN SOLUTION
    return 100 * 21.0 / (21.0 + 20 * (1.0 + 2.0))
    ### END SOLUTION


def live_chunks():
    """chunks whose activations rank 0 holds at most, one forward one backward (chunks)."""
    ### BEGIN SOLUTION
    return 8
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %% nbgrader={"grade": false, "grade_id": "answers", "locked": true, "schema_version": 3, "solution": false, "task": false}
answers = dict(
    bubble_1f1b=bubble_1f1b,
    bubble_zb1p=bubble_zb1p,
    bubble_dualpipe=bubble_dualpipe,
    share_1f1b=share_1f1b,
    live_chunks=live_chunks,
)

# %%
check("bill_bubbles", answers, variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "bubble_1f1b", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_bubbles", answers, "bubble_1f1b", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "bubble_zb1p", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_bubbles", answers, "bubble_zb1p", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "bubble_dualpipe", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_bubbles", answers, "bubble_dualpipe", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "share_1f1b", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_bubbles", answers, "share_1f1b", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "live_chunks", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_bubbles", answers, "live_chunks", variant=VARIANT, seed=seed)
