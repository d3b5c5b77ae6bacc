# %% [markdown]
# # Exercise 14 · Find the bug: a gate with a balancing bias
#
# **find the bug** · lesson 04, DeepSeekMoE routing · 10 points · about 20 minutes
#
# A gate: experts are chosen by sigmoid score plus bias; their weights are the scores alone, divided by their sum.
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
def gate(logits, bias, top_k):
    """Experts and weights: logits [T, E], bias [E] -> (topk_idx [T, K] ascending, weights [T, K])."""
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + bias
    best = np.argsort(-choice, axis=1, kind="stable")[:, :top_k]
    topk_idx = np.sort(best, axis=1)
    weights = np.take_along_axis(choice, topk_idx, axis=1)
    total = weights.sum(axis=1, keepdims=True)
    return topk_idx, weights / total


VARIANT = "b9acb1e0"


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def line():
    ### BEGIN SOLUTION
    return 7
    ### END SOLUTION


def witness():
    ### BEGIN SOLUTION
    return dict(
        logits=np.array([[0.1257, -0.1321, 0.6404]]),
        bias=np.array([0.6, 0.0, -0.5]),
        top_k=2,
    )
    ### END SOLUTION


def repaired(logits, bias, top_k):
    ### BEGIN SOLUTION
    """Experts and weights: logits [T, E], bias [E] -> (topk_idx [T, K] ascending, weights [T, K])."""
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + bias
    best = np.argsort(-choice, axis=1, kind="stable")[:, :top_k]
    topk_idx = np.sort(best, axis=1)
    weights = np.take_along_axis(scores, topk_idx, axis=1)
    total = weights.sum(axis=1, keepdims=True)
    return topk_idx, weights / total
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("bug_gate_bias", Finding(line, witness, repaired), variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "line", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_gate_bias", Finding(line, witness, repaired), "line", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "witness", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_gate_bias", Finding(line, witness, repaired), "witness", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "repaired", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_gate_bias", Finding(line, witness, repaired), "repaired", variant=VARIANT, seed=seed)
