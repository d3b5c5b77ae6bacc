# %% [markdown]
# # Exercise 04 · Find the bug: backward through a softmax
#
# **find the bug** · lesson 01, reverse mode by hand · 10 points · about 25 minutes
#
# The gradients of $p = \mathrm{softmax}(x W^T)$ by x and W, given the gradient by p.
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
def softmax_linear_backward(x, w, p, dp):
    """Gradients of p = softmax(x w^T): x [T, D], w [E, D], p and dp [T, E] -> (dx, dw)."""
    along = (dp * p).sum(axis=0, keepdims=True)
    dlogits = p * (dp - along)
    dx = dlogits @ w
    dw = dlogits.T @ x
    return dx, dw


VARIANT = "8bf4c868"


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def line():
    ### BEGIN SOLUTION
    return 3
    ### END SOLUTION


def witness():
    ### BEGIN SOLUTION
    return dict(
        x=np.array([[-0.6233], [0.0413]]),
        w=np.array([[-2.325], [-0.2188], [-1.2459]]),
        p=np.array([[0.1026, 0.2516, 0.6458], [0.7685, 0.1475, 0.0841]]),
        dp=np.array([[-0.7323, -0.5443, -0.3163], [0.4116, 1.0425, -0.1285]]),
    )
    ### END SOLUTION


def repaired(x, w, p, dp):
    ### BEGIN SOLUTION
    """Gradients of p = softmax(x w^T): x [T, D], w [E, D], p and dp [T, E] -> (dx, dw)."""
    along = (dp * p).sum(axis=1, keepdims=True)
    dlogits = p * (dp - along)
    dx = dlogits @ w
    dw = dlogits.T @ x
    return dx, dw
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("bug_backward", Finding(line, witness, repaired), variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "line", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_backward", Finding(line, witness, repaired), "line", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "witness", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_backward", Finding(line, witness, repaired), "witness", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "repaired", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_backward", Finding(line, witness, repaired), "repaired", variant=VARIANT, seed=seed)
