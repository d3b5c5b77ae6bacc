# %% [markdown]
# # Exercise 10 · Find the bug: what MLA appends to its cache
#
# **find the bug** · lesson 03, MLA and the latent cache · 10 points · about 25 minutes
#
# What MLA keeps of each token: its normed latent, and one key part that is made from x and turned by the token's
# position.
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
def cache_entries(x, w_latent, w_rope, norm, frequencies, start):
    """What the cache keeps of new tokens: x [S, D] at positions start.. -> [S, r + d_r]."""
    latent = x @ w_latent.T
    source = x
    rms = np.sqrt((latent**2).mean(axis=1, keepdims=True) + 1e-6)
    latent_normed = norm * latent / rms
    k_rope = source[:, : w_rope.shape[1]] @ w_rope.T
    position = np.arange(len(x))
    rotation = np.exp(1j * position[:, None] * frequencies)
    turned = (k_rope[:, 0::2] + 1j * k_rope[:, 1::2]) * rotation
    k_rope_turned = np.stack([turned.real, turned.imag], axis=2).reshape(k_rope.shape)
    return np.concatenate([latent_normed, k_rope_turned], axis=1)


VARIANT = "234d525e"


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def line():
    ### BEGIN SOLUTION
    return 8
    ### END SOLUTION


def witness():
    ### BEGIN SOLUTION
    return dict(
        x=np.array([[-0.7546, 1.6891, -0.2874, 1.5744, -0.4328, -0.7355]]),
        w_latent=np.array(
            [
                [0.2498, 1.0315, 0.161, -0.5855, -1.3412, -1.4015],
                [0.5027, 0.9897, -0.1643, -1.0744, 0.873, -1.2804],
                [-0.7131, 0.621, -2.2501, 0.3864, -0.5816, 0.1093],
                [-0.0757, 0.2021, 0.6942, -0.7584, 1.421, 0.7261],
                [0.8437, 1.1649, 0.7876, 0.8441, 0.0756, -1.4268],
                [-0.135, -0.7695, -1.4227, 0.2585, -0.5685, -1.0298],
            ]
        ),
        w_rope=np.array(
            [
                [-1.043, 0.2684, 0.3587, 1.3225, -0.0139, 1.0418],
                [1.4023, 1.1502, -2.3653, 1.2287, 0.3396, 0.4238],
                [0.3712, 0.3828, 0.3194, -0.3589, -1.9016, -0.1089],
                [-0.8037, 1.0802, -0.2888, 0.0835, -0.8496, -0.5106],
            ]
        ),
        norm=np.array([0.6902, 1.7972, 0.5892, 1.0712, 1.1447, 1.2333]),
        frequencies=np.array([0.9812, 0.8206]),
        start=3,
    )
    ### END SOLUTION


def repaired(x, w_latent, w_rope, norm, frequencies, start):
    ### BEGIN SOLUTION
    """What the cache keeps of new tokens: x [S, D] at positions start.. -> [S, r + d_r]."""
    latent = x @ w_latent.T
    source = x
    rms = np.sqrt((latent**2).mean(axis=1, keepdims=True) + 1e-6)
    latent_normed = norm * latent / rms
    k_rope = source[:, : w_rope.shape[1]] @ w_rope.T
    position = start + np.arange(len(x))
    rotation = np.exp(1j * position[:, None] * frequencies)
    turned = (k_rope[:, 0::2] + 1j * k_rope[:, 1::2]) * rotation
    k_rope_turned = np.stack([turned.real, turned.imag], axis=2).reshape(k_rope.shape)
    return np.concatenate([latent_normed, k_rope_turned], axis=1)
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("bug_latent_cache", Finding(line, witness, repaired), variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "line", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_latent_cache", Finding(line, witness, repaired), "line", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "witness", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_latent_cache", Finding(line, witness, repaired), "witness", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "repaired", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_latent_cache", Finding(line, witness, repaired), "repaired", variant=VARIANT, seed=seed)
