# %% [markdown]
# # Exercise 28 · An all-to-all that equals one rank
#
# **implement** · lesson 10, expert parallelism · 10 points · about 45 minutes
#
# R ranks hold `experts_per_rank` experts each: expert e lives on rank e // experts_per_rank. You see all ranks at once as lists,
# one entry a rank: x[r] [T_r, D], topk_idx[r] [T_r, K], weights[r] [T_r, K]. Return y[r] [T_r, D], the weighted sums of the
# experts' results, as if there were one rank.
#
# Two things are given. `expert(rank, e, rows)` applies expert e, on the rank that holds it, to rows [n, D]. `exchange(sent)` is the
# only way between ranks: sent[r][s] is an array from r to s; what comes back is received[s][r]. Whoever has nothing to send
# sends an empty array. Only rows that must travel may travel.

# %%
import numpy as np

from minidsv3.exercises import check


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def expert_parallel(x, topk_idx, weights, experts_per_rank, expert, exchange):
    """Lists over ranks in, list of [T_r, D] out."""
    ### BEGIN SOLUTION
    ranks = range(len(x))
    slots = [[np.argwhere(idx // experts_per_rank == s) for s in ranks] for idx in topk_idx]  # (t, k) from r to s
    rows = exchange([[x[r][slots[r][s][:, 0]] for s in ranks] for r in ranks])
    wanted = exchange([[topk_idx[r][tuple(slots[r][s].T)].astype(np.int16) for s in ranks] for r in ranks])
    results = []
    for s in ranks:
        results.append([np.empty_like(part) for part in rows[s]])
        for r in ranks:
            for e in np.unique(wanted[s][r]):
                mine = wanted[s][r] == e
                results[s][r][mine] = expert(s, int(e), rows[s][r][mine])
    back = exchange(results)
    y = [np.zeros_like(part) for part in x]
    for r in ranks:
        for s in ranks:
            for (t, k), row in zip(slots[r][s], back[r][s]):
                y[r][t] += weights[r][t, k] * row
    return y
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("all_to_all", expert_parallel)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "one_expert", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("all_to_all", expert_parallel, "one_expert", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "several", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("all_to_all", expert_parallel, "several", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "bytes", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("all_to_all", expert_parallel, "bytes", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "idle", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("all_to_all", expert_parallel, "idle", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("all_to_all", expert_parallel, "golden", seed=seed)
