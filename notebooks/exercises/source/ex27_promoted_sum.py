# %% [markdown]
# # Exercise 27 · Promoted accumulation
#
# **implement** · lesson 09, FP8: tensor core and training · 10 points · about 20 minutes
#
# The tensor core of an H800 adds FP8 products with about 14 bits (section 3.3.2). Add a small product to a large sum and its low
# bits are lost. So every `interval` products the narrow sum is added to a float32 number, and a new one begins.
#
# `narrow(x)` is given: what the narrow accumulator keeps of a sum. Add number after number, in order.

# %%
import numpy as np

from minidsv3.exercises import check


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def promoted_sum(products, interval, narrow):
    """products float32 [n] -> float32."""
    ### BEGIN SOLUTION
    total = np.float32(0)
    for start in range(0, len(products), interval):
        part = np.float32(0)
        for product in products[start : start + interval]:
            part = narrow(part + product)
        total += part
    return total
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("promoted_sum", promoted_sum)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "short", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("promoted_sum", promoted_sum, "short", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "whole", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("promoted_sum", promoted_sum, "whole", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "rest", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("promoted_sum", promoted_sum, "rest", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "error", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("promoted_sum", promoted_sum, "error", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("promoted_sum", promoted_sum, "golden", seed=seed)
