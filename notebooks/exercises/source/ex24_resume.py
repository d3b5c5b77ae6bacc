# %% [markdown]
# # Exercise 24 · Resume to the same bits
#
# **implement** · lesson 07, training · 10 points · about 25 minutes
#
# A run must be able to stop and go on to the same bits. `run` is an AdamW run in small with the attributes `weights`,
# `exp_avg`, `exp_avg_sq` (arrays), `steps`, `position` (whole numbers) and `rng` (a NumPy generator, which draws noise).
#
# `save(run)` returns whatever `restore(run, saved)` needs to put a fresh run into the same state. Between the two the first
# run trains on, and must not change what was saved.

# %%
import numpy as np

from minidsv3.exercises import check, use


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def save(run):
    """Everything that decides what the run does next."""
    ### BEGIN SOLUTION
    arrays = {name: getattr(run, name).copy() for name in ("weights", "exp_avg", "exp_avg_sq")}
    return arrays, run.steps, run.position, run.rng.bit_generator.state
    ### END SOLUTION


def restore(run, saved):
    """Put `run` into the saved state."""
    ### BEGIN SOLUTION
    arrays, run.steps, run.position, state = saved
    for name, array in arrays.items():
        setattr(run, name, array.copy())
    run.rng.bit_generator.state = state
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("resume", dict(save=save, restore=restore))

# %% [markdown]
# **Use yours.** Once all properties hold, the smallest model trains twenty steps with your code inside: it is stopped after
# half of them, and a fresh model goes on from what you saved.

# %%
use("resume", dict(save=save, restore=restore))

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "weights", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("resume", dict(save=save, restore=restore), "weights", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "moments", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("resume", dict(save=save, restore=restore), "moments", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "counters", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("resume", dict(save=save, restore=restore), "counters", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "generator", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("resume", dict(save=save, restore=restore), "generator", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "bits", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("resume", dict(save=save, restore=restore), "bits", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("resume", dict(save=save, restore=restore), "golden", seed=seed)
