# %% [markdown]
# # Exercise 11 · Measure: absorbed or recomputed?
#
# **measure and explain** · lesson 03, MLA and the latent cache · 10 points · about 30 minutes
#
# Attention over 4,096 cached tokens of DeepSeek-V3, one layer: FLOPs when n new tokens come at once, absorbed or with keys and
# values recomputed. `generation.costs.attention_cost(cfg, path, 4096, n).flops` counts them.
#
# `measure()` returns a dict with three arrays of one length: `new_tokens` (from 1 to at least 512, dense enough to locate the
# crossing within 30 %), `absorbed` and `recomputed`.

# %%
import matplotlib.pyplot as plt
import numpy as np

from minidsv3.config import ModelConfig
from minidsv3.exercises import check, measured
from minidsv3.generation.costs import PATHS, attention_cost


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def measure():
    """-> dict(new_tokens=[...], absorbed=[...], recomputed=[...])."""
    ### BEGIN SOLUTION
    cfg = ModelConfig.preset("deepseek-v3")
    new_tokens = np.unique(np.geomspace(1, 1024, 60).astype(int))
    flops = {path: np.array([attention_cost(cfg, path, 4096, int(n)).flops for n in new_tokens]) for path in PATHS}
    return dict(new_tokens=new_tokens, absorbed=flops["absorbed"], recomputed=flops["recomputed"])
    ### END SOLUTION


# %%
data = measured(measure)
plt.loglog(data["new_tokens"], data["absorbed"], label="absorbed")
plt.loglog(data["new_tokens"], data["recomputed"], "--", label="recomputed")
plt.xlabel("new tokens at once")
plt.ylabel("FLOPs of one layer")
plt.legend()
# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("measure_decode", measure)

# %% [markdown]
# Which way should a server take for one new token, which for a prompt of 1,000, and why do the curves cross? What does the
# count of FLOPs leave out when one token is decoded?
#
# *Rubric: 2 points for the reading of the curve with its numbers, 1 for the reason, 1 for the limit of the measurement.*

# %% [markdown] nbgrader={"grade": true, "grade_id": "explain", "locked": false, "points": 4, "schema_version": 3, "solution": true, "task": false}
# YOUR ANSWER HERE

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "range", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("measure_decode", measure, "range", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "absorbed", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("measure_decode", measure, "absorbed", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "recomputed", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("measure_decode", measure, "recomputed", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "crossing", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("measure_decode", measure, "crossing", seed=seed)
