# %% [markdown]
# # Exercise 15 · Find the bug: node-limited routing
#
# **find the bug** · lesson 04, DeepSeekMoE routing · 10 points · about 20 minutes
#
# Node-limited routing: keep the groups with the best sum of two experts, choose the best experts in them.
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
def group_limited_experts(choice, top_k, n_group, topk_group):
    """Experts of each token from biased scores choice [T, E] -> int64 [T, K], ascending."""
    T, E = choice.shape
    grouped = choice.reshape(T, n_group, E // n_group)
    best_two = np.sort(grouped, axis=2)[:, :, -2:]
    group_score = best_two.sum(axis=2)
    kept = np.argsort(-group_score, axis=1, kind="stable")[:, :topk_group]
    mask = np.zeros((T, n_group), dtype=bool)
    np.put_along_axis(mask, kept, True, axis=1)
    masked = np.where(mask[:, :, None], grouped, 0.0)
    order = np.argsort(-masked.reshape(T, E), axis=1, kind="stable")
    return np.sort(order[:, :top_k], axis=1)


VARIANT = "b07c5633"


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def line():
    ### BEGIN SOLUTION
    return 10
    ### END SOLUTION


def witness():
    ### BEGIN SOLUTION
    return dict(
        choice=np.array([[-3.0, -4.0, -2.0, -9.0, -1.0, -8.0]]),
        top_k=2,
        n_group=3,
        topk_group=1,
    )
    ### END SOLUTION


def repaired(choice, top_k, n_group, topk_group):
    ### BEGIN SOLUTION
    """Experts of each token from biased scores choice [T, E] -> int64 [T, K], ascending."""
    T, E = choice.shape
    grouped = choice.reshape(T, n_group, E // n_group)
    best_two = np.sort(grouped, axis=2)[:, :, -2:]
    group_score = best_two.sum(axis=2)
    kept = np.argsort(-group_score, axis=1, kind="stable")[:, :topk_group]
    mask = np.zeros((T, n_group), dtype=bool)
    np.put_along_axis(mask, kept, True, axis=1)
    masked = np.where(mask[:, :, None], grouped, -np.inf)
    order = np.argsort(-masked.reshape(T, E), axis=1, kind="stable")
    return np.sort(order[:, :top_k], axis=1)
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("bug_group_mask", Finding(line, witness, repaired), variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "line", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_group_mask", Finding(line, witness, repaired), "line", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "witness", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_group_mask", Finding(line, witness, repaired), "witness", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "repaired", "locked": true, "points": 4, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bug_group_mask", Finding(line, witness, repaired), "repaired", variant=VARIANT, seed=seed)
