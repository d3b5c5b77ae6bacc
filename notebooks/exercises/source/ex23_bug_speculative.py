# %% [markdown]
# # Exercise 23 · Find the bug: keeping or rejecting a guess
#
# **find the bug** · lesson 06, multi-token prediction · 10 points · about 20 minutes
#
# Keeping or rejecting a guess in speculative decoding, lossless: keep with probability $\min(1, p/q)$, else draw from
# $\max(p - q, 0)$, normalised.
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
def verify(p, q, draft, u, v):
    """Token and whether the guess was kept: p, q [V], guess drawn from q, u and v uniform in [0, 1)."""
    ratio = p[draft] / q[draft]
    accepted = bool(p[draft] > 0.8)
    rest = np.maximum(p - q, 0.0)
    if accepted:
        return int(draft), accepted
    cumulative = np.cumsum(rest) / rest.sum()
    token = int(np.searchsorted(cumulative, v, side="right"))
    return token, accepted


VARIANT = "5d3b1168"


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def line():
    ### BEGIN SOLUTION
    return 4
    ### END SOLUTION


def witness():
    ### BEGIN SOLUTION
    return dict(
        p=np.array([0.6939, 0.3061]),
        q=np.array([0.6254, 0.3746]),
        draft=0,
        u=0.8132702392002724,
        v=0.9127555772777217,
    )
    ### END SOLUTION


def repaired(p, q, draft, u, v):
    ### BEGIN SOLUTION
    """Token and whether the guess was kept: p, q [V], guess drawn from q, u and v uniform in [0, 1)."""
    ratio = p[draft] / q[draft]
    accepted = bool(u < ratio)
    rest = np.maximum(p - q, 0.0)
    if accepted:
        return int(draft), accepted
    cumulative = np.cumsum(rest) / rest.sum()
    token = int(np.searchsorted(cumulative, v, side="right"))
    return token, accepted
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("bug_speculative", Finding(line, witness, repaired), variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "line", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_speculative", Finding(line, witness, repaired), "line", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "witness", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_speculative", Finding(line, witness, repaired), "witness", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "repaired", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_speculative", Finding(line, witness, repaired), "repaired", variant=VARIANT, seed=seed)
