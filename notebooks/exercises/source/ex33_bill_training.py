# %% [markdown]
# # Exercise 33 · GPU hours and dollars of a training run
#
# **account** · lesson 12, network and the bill · 10 points · about 20 minutes
#
# GPU hours, dollars and the share of the peak. The numbers are those of the report's Table 1 and of an H800.

# %%
from minidsv3.exercises import check

# %% nbgrader={"grade": false, "grade_id": "given", "locked": true, "schema_version": 3, "solution": false, "task": false}
GIVEN = {
    "active_parameters": 37550000000.0,
    "tokens": 14800000000000.0,
    "gpu_hours_per_trillion_tokens": 180000.0,
    "context_hours": 119000.0,
    "post_hours": 5000.0,
    "dollars_per_gpu_hour": 2.0,
    "gpus": 2048,
    "bf16_tflops": 989.0,
}
VARIANT = GIVEN


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def pretraining_hours():
    """pre-training alone (GPU hours)."""
    ### BEGIN SOLUTION
    return 180e3 * 14.8
    ### END SOLUTION


def dollars():
    """pre-training, context extension and post-training together (US dollars)."""
    ### BEGIN SOLUTION
    return (180e3 * 14.8 + 119e3 + 5e3) * 2.0
    ### END SOLUTION


def days():
    """of pre-training on `gpus` GPUs (days)."""
    ### BEGIN SOLUTION
    return 180e3 * 14.8 / 2048 / 24
    ### END SOLUTION


def flops():
    """of pre-training, 6 for each active parameter and token (FLOPs)."""
    ### BEGIN SOLUTION
    return 6 * 37.55e9 * 14.8e12
    ### END SOLUTION


def utilisation():
    """of the BF16 peak that these FLOPs need in these GPU hours (percent)."""
    ### BEGIN SOLUTION
    return 100 * 6 * 37.55e9 * 14.8e12 / (180e3 * 14.8 * 3600 * 989e12)
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %% nbgrader={"grade": false, "grade_id": "answers", "locked": true, "schema_version": 3, "solution": false, "task": false}
answers = dict(
    pretraining_hours=pretraining_hours,
    dollars=dollars,
    days=days,
    flops=flops,
    utilisation=utilisation,
)

# %%
check("bill_training", answers, variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "pretraining_hours", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_training", answers, "pretraining_hours", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "dollars", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_training", answers, "dollars", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "days", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_training", answers, "days", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "flops", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_training", answers, "flops", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "utilisation", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_training", answers, "utilisation", variant=VARIANT, seed=seed)
