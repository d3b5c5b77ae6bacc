# %% [markdown]
# # Exercise 26 · Find the bug: blocks with power-of-two scales
#
# **find the bug** · lesson 08, FP8: formats and scales · 10 points · about 20 minutes
#
# A matrix through square blocks, each with a scale that is a power of two and large enough that nothing is clipped;
# blocks at the edge are smaller.
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
def through_blocks(w, block):
    """w [M, N] through blocks with ue8m0 scales, codes rounded to whole numbers up to 448: what is read back."""
    out = np.zeros_like(w)
    for a in range(0, w.shape[0], block):
        for b in range(0, w.shape[1], block):
            part = w[a : a + block, b : b + block]
            amax = max(np.abs(part).max(), 1e-4)
            scale = 2.0 ** np.ceil(np.log2(amax / 448))
            codes = np.clip(np.round(part / scale), -448, 448)
            stored_scale = 2.0 ** np.ceil(np.log2(scale * 1.001))
            out[a : a + block, b : b + block] = codes * stored_scale
    return out


VARIANT = "13765c8c"


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def line():
    ### BEGIN SOLUTION
    return 10
    ### END SOLUTION


def witness():
    ### BEGIN SOLUTION
    return dict(
        w=np.array([[0.1257]]),
        block=1,
    )
    ### END SOLUTION


def repaired(w, block):
    ### BEGIN SOLUTION
    """w [M, N] through blocks with ue8m0 scales, codes rounded to whole numbers up to 448: what is read back."""
    out = np.zeros_like(w)
    for a in range(0, w.shape[0], block):
        for b in range(0, w.shape[1], block):
            part = w[a : a + block, b : b + block]
            amax = max(np.abs(part).max(), 1e-4)
            scale = 2.0 ** np.ceil(np.log2(amax / 448))
            codes = np.clip(np.round(part / scale), -448, 448)
            stored_scale = scale
            out[a : a + block, b : b + block] = codes * stored_scale
    return out
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("bug_scales", Finding(line, witness, repaired), variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "line", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_scales", Finding(line, witness, repaired), "line", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "witness", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_scales", Finding(line, witness, repaired), "witness", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "repaired", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_scales", Finding(line, witness, repaired), "repaired", variant=VARIANT, seed=seed)
