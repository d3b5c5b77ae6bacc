# %% [markdown]
# # Exercise 18 · Find the bug: the sequence-wise balance loss
#
# **find the bug** · lesson 05, balancing · 10 points · about 20 minutes
#
# The sequence-wise balance loss (V3 report, Eq. 17-20): per sequence $\sum_i f_i P_i$, then the mean over sequences.
#
# The module below does this, runs, and looks right. **One line is wrong.**
#
# * `line()` returns its number; the line with `def` is line 1.
# * `witness()` returns inputs, a dict with the names of the arguments, on which the module's result is wrong.
# * `repaired(...)` is the module, mended.

# %%
import numpy as np

from minidsv3.exercises import Finding, check


# %% nbgrader={"grade": false, "grade_id": "given", "locked": true, "schema_version": 3, "solution": false, "task": false}
def balance_loss(scores, topk_idx):
    """Eq. 17-20 without alpha, mean over sequences: scores [B, S, E] > 0, topk_idx [B, S, K]."""
    B, S, E = scores.shape
    K = topk_idx.shape[2]
    chosen = np.zeros((B, S, E))
    np.put_along_axis(chosen, topk_idx, 1.0, axis=2)
    f = chosen.sum(axis=1) * E / (K * S)
    share = scores / scores.sum(axis=2, keepdims=True)
    P = share.mean(axis=1)
    return (f.mean(axis=0) * P.mean(axis=0)).sum()


VARIANT = "60751752"


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def line():
    ### BEGIN SOLUTION
    return 10
    ### END SOLUTION


def witness():
    ### BEGIN SOLUTION
    return dict(
        scores=np.array([[[0.687, 0.3198, 0.091]], [[0.0665, 0.8633, 0.9628]]]),
        topk_idx=np.array([[[0, 1]], [[1, 2]]]),
    )
    ### END SOLUTION


def repaired(scores, topk_idx):
    ### BEGIN SOLUTION
    """Eq. 17-20 without alpha, mean over sequences: scores [B, S, E] > 0, topk_idx [B, S, K]."""
    B, S, E = scores.shape
    K = topk_idx.shape[2]
    chosen = np.zeros((B, S, E))
    np.put_along_axis(chosen, topk_idx, 1.0, axis=2)
    f = chosen.sum(axis=1) * E / (K * S)
    share = scores / scores.sum(axis=2, keepdims=True)
    P = share.mean(axis=1)
    return (f * P).sum(axis=1).mean()
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("bug_balance_loss", Finding(line, witness, repaired), variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "line", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_balance_loss", Finding(line, witness, repaired), "line", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "witness", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_balance_loss", Finding(line, witness, repaired), "witness", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "repaired", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_balance_loss", Finding(line, witness, repaired), "repaired", variant=VARIANT, seed=seed)
