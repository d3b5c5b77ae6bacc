# %% [markdown]
# # Exercise 20 · Multi-token prediction: inputs and targets of depth k
#
# **implement** · lesson 06, multi-token prediction · 10 points · about 20 minutes
#
# A module of depth k joins what the model knows at position i, $h_i$ (it has seen tokens 0..i), with tokens i+1..i+k, one a
# depth, and predicts the token after them. Off by one, and it is given the very token it is to predict: the loss falls to
# nothing, and so does the use of the module.
#
# For tokens [B, n] and depth k return, for the places where there is something to predict, the positions i, int [P]; `seen`
# int [B, P], the token whose embedding joins at this depth; `targets` int [B, P]. Depth 0 is the main model (its `seen` is
# the token itself).

# %%
import numpy as np

from minidsv3.exercises import check


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def mtp_targets(tokens, depth):
    """tokens int [B, n] -> (positions [P], seen [B, P], targets [B, P]), P = n - 1 - depth."""
    ### BEGIN SOLUTION
    places = tokens.shape[1] - 1 - depth
    return np.arange(places), tokens[:, depth : depth + places], tokens[:, depth + 1 : depth + 1 + places]
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("mtp_targets", mtp_targets)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "main", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("mtp_targets", mtp_targets, "main", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "lengths", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("mtp_targets", mtp_targets, "lengths", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "targets", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("mtp_targets", mtp_targets, "targets", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "seen", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("mtp_targets", mtp_targets, "seen", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "no_copy", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("mtp_targets", mtp_targets, "no_copy", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("mtp_targets", mtp_targets, "golden", seed=seed)
