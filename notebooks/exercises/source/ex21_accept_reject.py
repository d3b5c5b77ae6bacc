# %% [markdown]
# # Exercise 21 · Speculative decoding: accept, reject, and lose nothing
#
# **implement** · lesson 06, multi-token prediction · 10 points · about 35 minutes
#
# A cheap model drew the guess `draft` from q; the real model says p. Keep the guess with probability $\min(1, p/q)$; otherwise
# draw from $\max(p - q, 0)$, normalised (Leviathan et al. 2023). Then tokens come exactly as the real model would have drawn
# them, and that is what is checked, with a chi-square test.

# %%
import numpy as np

from minidsv3.exercises import check


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def verify(p, q, draft, rng):
    """p, q float64 [V], draft int, rng np.random.Generator -> (token, accepted)."""
    ### BEGIN SOLUTION
    if rng.random() < p[draft] / q[draft]:
        return draft, True
    rest = np.maximum(p - q, 0)
    return int(rng.choice(len(p), p=rest / rest.sum())), False
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("accept_reject", verify)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "equal", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("accept_reject", verify, "equal", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "never", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("accept_reject", verify, "never", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "rate", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("accept_reject", verify, "rate", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "after_rejection", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("accept_reject", verify, "after_rejection", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "lossless", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("accept_reject", verify, "lossless", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("accept_reject", verify, "golden", seed=seed)
