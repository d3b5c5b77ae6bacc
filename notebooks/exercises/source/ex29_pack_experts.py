# %% [markdown]
# # Exercise 29 · Packing and replicating experts as EPLB does
#
# **implement** · lesson 10, expert parallelism · 10 points · about 30 minutes
#
# EPLB places experts on GPUs with two greedy rules.
#
# * `pack(weight, packs)`: weight [n] -> int64 [n], the pack of each item: heaviest item first, into the lightest pack that has
#   room (a pack holds n / packs items). Ties go to the lowest index, of items and of packs.
# * `replicas(weight, count)`: int64 [n], how many replicas each of n experts gets when there are `count` in all: everyone one,
#   each further one to the expert whose replicas carry most, weight / replicas.

# %%
import numpy as np

from minidsv3.exercises import check


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def pack(weight, packs):
    """float [n] -> int64 [n]."""
    ### BEGIN SOLUTION
    pack_of_item = np.empty(len(weight), dtype=np.int64)
    load, filled = np.zeros(packs), np.zeros(packs, dtype=np.int64)
    for item in np.argsort(-weight, kind="stable"):
        lightest = np.where(filled < len(weight) // packs, load, np.inf).argmin()
        pack_of_item[item] = lightest
        load[lightest] += weight[item]
        filled[lightest] += 1
    return pack_of_item
    ### END SOLUTION


def replicas(weight, count):
    """float [n] -> int64 [n], their sum is count."""
    ### BEGIN SOLUTION
    replicas_of_expert = np.ones(len(weight), dtype=np.int64)
    for _ in range(count - len(weight)):
        replicas_of_expert[(weight / replicas_of_expert).argmax()] += 1
    return replicas_of_expert
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("pack_experts", dict(pack=pack, replicas=replicas))

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "room", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("pack_experts", dict(pack=pack, replicas=replicas), "room", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "greedy", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("pack_experts", dict(pack=pack, replicas=replicas), "greedy", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "ties", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("pack_experts", dict(pack=pack, replicas=replicas), "ties", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "replicas", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("pack_experts", dict(pack=pack, replicas=replicas), "replicas", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("pack_experts", dict(pack=pack, replicas=replicas), "golden", seed=seed)
