# %% [markdown]
# # Exercise 22 · Find the bug: hidden states and embeddings for MTP
#
# **find the bug** · lesson 06, multi-token prediction · 10 points · about 20 minutes
#
# Inputs and targets of the first MTP module: $h_i$ joins the embedding of token $i+1$ and predicts token $i+2$; the
# released weights take [embedding; hidden state].
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
def mtp_batch(tokens, h, table):
    """Depth 1: tokens [B, S+1], h [B, S, D], table [V, D] -> (inputs [B, S-1, 2D], targets [B, S-1])."""
    places = tokens.shape[1] - 2
    seen = tokens[:, 1 : places + 1]
    targets = tokens[:, 1 : places + 1]
    hidden = h[:, :places]
    embedded = table[seen]
    hidden_normed = hidden / np.sqrt((hidden**2).mean(axis=2, keepdims=True) + 1e-6)
    embedded_normed = embedded / np.sqrt((embedded**2).mean(axis=2, keepdims=True) + 1e-6)
    inputs = np.concatenate([embedded_normed, hidden_normed], axis=2)
    return inputs, targets


VARIANT = "8712e7d5"


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def line():
    ### BEGIN SOLUTION
    return 5
    ### END SOLUTION


def witness():
    ### BEGIN SOLUTION
    return dict(
        tokens=np.array([[2, 11, 26]]),
        h=np.array([[[2.3515], [2.9035]]]),
        table=np.array(
            [
                [-1.906],
                [-2.7435],
                [-2.9217],
                [-2.4577],
                [-1.7798],
                [-3.0096],
                [-2.2092],
                [-2.1592],
                [-1.4592],
                [-1.7853],
                [-1.6446],
                [-2.6538],
                [-2.1296],
                [-1.216],
                [-0.5066],
                [-3.2591],
                [-0.4861],
                [-0.6541],
                [-1.2187],
                [-1.7355],
                [-2.3139],
                [-0.542],
                [-0.0397],
                [-0.1984],
                [-0.6849],
                [-1.6426],
                [-3.2083],
                [-2.0045],
                [-1.3435],
                [-3.2884],
            ]
        ),
    )
    ### END SOLUTION


def repaired(tokens, h, table):
    ### BEGIN SOLUTION
    """Depth 1: tokens [B, S+1], h [B, S, D], table [V, D] -> (inputs [B, S-1, 2D], targets [B, S-1])."""
    places = tokens.shape[1] - 2
    seen = tokens[:, 1 : places + 1]
    targets = tokens[:, 2 : places + 2]
    hidden = h[:, :places]
    embedded = table[seen]
    hidden_normed = hidden / np.sqrt((hidden**2).mean(axis=2, keepdims=True) + 1e-6)
    embedded_normed = embedded / np.sqrt((embedded**2).mean(axis=2, keepdims=True) + 1e-6)
    inputs = np.concatenate([embedded_normed, hidden_normed], axis=2)
    return inputs, targets
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("bug_mtp_index", Finding(line, witness, repaired), variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "line", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_mtp_index", Finding(line, witness, repaired), "line", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "witness", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_mtp_index", Finding(line, witness, repaired), "witness", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "repaired", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_mtp_index", Finding(line, witness, repaired), "repaired", variant=VARIANT, seed=seed)
