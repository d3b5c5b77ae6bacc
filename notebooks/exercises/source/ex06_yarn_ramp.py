# %% [markdown]
# # Exercise 06 · YaRN's ramp over the channel pairs
#
# **implement** · lesson 02, RoPE and YaRN · 10 points · about 25 minutes
#
# YaRN (V3 report, section 4.3; Peng et al. 2023) extends the context by `factor`: pairs that turn fast keep their frequency
# $\theta^{-2j/d}$, slow ones are divided by `factor`, and between two *correction pairs* the two are blended linearly.
#
# The pair that turns n times in the original context is $j(n) = d \ln(\mathrm{context} / 2\pi n) / (2\ln\theta)$. The ramp is 0 up to
# $\lfloor j(\beta_{fast})\rfloor$ (not below 0) and 1 from $\lceil j(\beta_{slow})\rceil$ (not above d - 1) on.

# %%
import numpy as np

from minidsv3.exercises import check, use


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def yarn_frequencies(d_r, theta, factor, context, beta_fast, beta_slow):
    """Angle per position of each pair: float64 [d_r / 2]."""

    ### BEGIN SOLUTION
    def pair(turns):
        return d_r * np.log(context / (2 * np.pi * turns)) / (2 * np.log(theta))

    low, high = max(np.floor(pair(beta_fast)), 0), min(np.ceil(pair(beta_slow)), d_r - 1)
    j = np.arange(d_r // 2)
    ramp = np.clip((j - low) / max(high - low, 0.001), 0, 1)
    plain = theta ** (-2 * j / d_r)
    return plain * (1 - ramp) + plain / factor * ramp
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("yarn_ramp", yarn_frequencies)

# %% [markdown]
# **Use yours.** Once all properties hold, the smallest model trains twenty steps with your code inside, under DeepSeek-V3's
# own YaRN settings.

# %%
use("yarn_ramp", yarn_frequencies)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "ends", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("yarn_ramp", yarn_frequencies, "ends", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "order", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("yarn_ramp", yarn_frequencies, "order", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "no_stretch", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("yarn_ramp", yarn_frequencies, "no_stretch", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "ramp", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("yarn_ramp", yarn_frequencies, "ramp", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("yarn_ramp", yarn_frequencies, "golden", seed=seed)
