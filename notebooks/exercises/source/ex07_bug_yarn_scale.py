# %% [markdown]
# # Exercise 07 · Find the bug: scores under RoPE and YaRN
#
# **find the bug** · lesson 02, RoPE and YaRN · 10 points · about 25 minutes
#
# Attention weights of the last query, with rotated queries and keys (neighbouring channels are a pair) and
# YaRN's factor on the scores: $\mathrm{mscale}^2 / \sqrt d$ with $\mathrm{mscale} = 0.1 \ln(\mathrm{factor}) + 1$.
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
def last_query_weights(q, k, frequencies, factor):
    """Attention weights of the last query over all keys, YaRN with mscale_all_dim = 1: q, k [S, d] -> [S]."""
    S, d = q.shape
    angles = np.arange(S)[:, None] * frequencies
    rotation = np.exp(1j * angles)
    q_pairs = q[:, 0::2] + 1j * q[:, 1::2]
    k_pairs = k[:, 0::2] + 1j * k[:, 1::2]
    q_turned = q_pairs * rotation
    k_turned = k_pairs * rotation
    mscale = 0.1 * np.log(factor) + 1
    scale = 1 / np.sqrt(d)
    scores = scale * (q_turned[-1] * k_turned.conj()).real.sum(axis=1)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


VARIANT = "eaca91a2"


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def line():
    ### BEGIN SOLUTION
    return 11
    ### END SOLUTION


def witness():
    ### BEGIN SOLUTION
    return dict(
        q=np.array([[1.304, 0.9471, -0.7037, -1.2654], [-0.6233, 0.0413, -2.325, -0.2188]]),
        k=np.array([[-1.2459, -0.7323, -0.5443, -0.3163], [0.4116, 1.0425, -0.1285, 1.3665]]),
        frequencies=np.array([0.7365, 0.7178]),
        factor=37.0,
    )
    ### END SOLUTION


def repaired(q, k, frequencies, factor):
    ### BEGIN SOLUTION
    """Attention weights of the last query over all keys, YaRN with mscale_all_dim = 1: q, k [S, d] -> [S]."""
    S, d = q.shape
    angles = np.arange(S)[:, None] * frequencies
    rotation = np.exp(1j * angles)
    q_pairs = q[:, 0::2] + 1j * q[:, 1::2]
    k_pairs = k[:, 0::2] + 1j * k[:, 1::2]
    q_turned = q_pairs * rotation
    k_turned = k_pairs * rotation
    mscale = 0.1 * np.log(factor) + 1
    scale = mscale**2 / np.sqrt(d)
    scores = scale * (q_turned[-1] * k_turned.conj()).real.sum(axis=1)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("bug_yarn_scale", Finding(line, witness, repaired), variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "line", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_yarn_scale", Finding(line, witness, repaired), "line", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "witness", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_yarn_scale", Finding(line, witness, repaired), "witness", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "repaired", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_yarn_scale", Finding(line, witness, repaired), "repaired", variant=VARIANT, seed=seed)
