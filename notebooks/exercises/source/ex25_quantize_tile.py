# %% [markdown]
# # Exercise 25 · A scale for each tile of 1x128
#
# **implement** · lesson 08, FP8: formats and scales · 10 points · about 25 minutes
#
# E4M3 has 3 fraction bits and ends at 448. DeepSeek-V3 gives every 1x128 tile of an activation its own scale (section 3.3.2):
# the tile's largest magnitude / 448. What is kept is `code = round(x / scale)` and the scale; the value is code * scale.
#
# `round_e4m3(x)` is given: it rounds to the nearest E4M3 number, kept in float32. The last tile may be shorter; a tile of
# zeros needs a scale above 0.

# %%
import numpy as np

from minidsv3.exercises import check, use


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def quantize(x, block, round_e4m3):
    """x float32 [N, C] -> (codes float32 [N, C], scales float32 [N, ceil(C / block)])."""
    ### BEGIN SOLUTION
    starts = np.arange(0, x.shape[1], block)
    amax = np.maximum.reduceat(np.abs(x), starts, axis=1)
    scales = np.where(amax > 0, amax / np.float32(448), np.float32(1)).astype(np.float32)
    return round_e4m3(x / np.repeat(scales, block, axis=1)[:, : x.shape[1]]), scales
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("quantize_tile", quantize)

# %% [markdown]
# **Use yours.** Once all properties hold, the smallest model trains twenty steps with your code inside.

# %%
use("quantize_tile", quantize)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "scales", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("quantize_tile", quantize, "scales", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "codes", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("quantize_tile", quantize, "codes", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "edge", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("quantize_tile", quantize, "edge", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "zeros", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("quantize_tile", quantize, "zeros", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("quantize_tile", quantize, "golden", seed=seed)
