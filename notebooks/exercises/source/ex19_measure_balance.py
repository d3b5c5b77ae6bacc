# %% [markdown]
# # Exercise 19 · Measure: how fast should the bias move?
#
# **measure and explain** · lesson 05, balancing · 10 points · about 35 minutes
#
# `simulate(speed)` is an apparatus: 200 steps of a gate over 16 experts, some of them popular, under the bias rule with this
# speed; it returns loads int [200, 16]. How fast should the bias move?
#
# `measure()` returns a dict: `speeds` (0 and at least three more, spanning a factor of 100), `loads` (a list, one array a speed) and
# `max_vio`, MaxVio = (max - mean) / mean of the load summed over the last 50 steps, one number a speed. The best speed must
# lie inside your sweep.

# %%
import matplotlib.pyplot as plt
import numpy as np

from minidsv3.exercises import check, measured
from minidsv3.exercises.ex19_measure_balance import simulate


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def measure():
    """-> dict(speeds=[...], loads=[...], max_vio=[...])."""
    ### BEGIN SOLUTION
    speeds = [0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    loads = [simulate(speed) for speed in speeds]
    late = [load[-50:].sum(axis=0) for load in loads]
    return dict(speeds=speeds, loads=loads, max_vio=[(n.max() - n.mean()) / n.mean() for n in late])
    ### END SOLUTION


# %%
data = measured(measure)
plt.semilogx(data["speeds"][1:], data["max_vio"][1:], "o-", label="with the rule")
plt.axhline(data["max_vio"][0], linestyle="--", label="speed 0")
plt.xlabel("speed")
plt.ylabel("MaxVio of the last 50 steps")
plt.legend()
# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("measure_balance", measure)

# %% [markdown]
# Which speed would you take, and what goes wrong below and above it? The report uses 0.001 with batches of 63 million
# tokens: why may a small model need another value?
#
# *Rubric: 2 points for the reading of the curve with its numbers, 1 for the reason, 1 for the limit of the measurement.*

# %% [markdown] nbgrader={"grade": true, "grade_id": "explain", "locked": false, "points": 4, "schema_version": 3, "solution": true, "task": false}
# YOUR ANSWER HERE

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "loads", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("measure_balance", measure, "loads", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "sweep", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("measure_balance", measure, "sweep", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "max_vio", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("measure_balance", measure, "max_vio", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "best", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("measure_balance", measure, "best", seed=seed)
