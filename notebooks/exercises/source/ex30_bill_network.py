# %% [markdown]
# # Exercise 30 · A token's bytes between nodes, and the switches that carry them
#
# **account** · lesson 10, expert parallelism · 10 points · about 30 minutes
#
# A token is sent once to each node that holds one of its experts (node-limited routing: at most `nodes_per_token`), in
# `dispatch_bytes` a number, and its sums come back in `combine_bytes` a number. And the switches: fat-trees at full size.

# %%
from minidsv3.exercises import check

# %% nbgrader={"grade": false, "grade_id": "given", "locked": true, "schema_version": 3, "solution": false, "task": false}
GIVEN = {
    "hidden_size": 7168,
    "moe_layers": 58,
    "nodes_per_token": 4,
    "dispatch_bytes": 1,
    "combine_bytes": 2,
    "ports": 64,
    "planes": 8,
}
VARIANT = GIVEN


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def dispatch_bytes_per_token():
    """sent between nodes for one token's dispatch in one layer, none of its nodes being its own (bytes)."""
    ### BEGIN SOLUTION
    return 7168 * 4 * 1
    ### END SOLUTION


def forward_bytes_per_token():
    """dispatch and combine of one token in all layers with experts, forward pass (bytes)."""
    ### BEGIN SOLUTION
    return 58 * 7168 * 4 * (1 + 2)
    ### END SOLUTION


def ft2_endpoints():
    """of a two-layer fat-tree of switches with `ports` ports (endpoints)."""
    ### BEGIN SOLUTION
    return 64 * 64 // 2
    ### END SOLUTION


def ft3_switches():
    """of the three-layer fat-tree at full size (switches)."""
    ### BEGIN SOLUTION
    return 64 * 64 + (64 // 2) ** 2
    ### END SOLUTION


def mpft_switches():
    """of `planes` separate two-layer fat-trees (switches)."""
    ### BEGIN SOLUTION
    return 8 * (64 + 64 // 2)
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %% nbgrader={"grade": false, "grade_id": "answers", "locked": true, "schema_version": 3, "solution": false, "task": false}
answers = dict(
    dispatch_bytes_per_token=dispatch_bytes_per_token,
    forward_bytes_per_token=forward_bytes_per_token,
    ft2_endpoints=ft2_endpoints,
    ft3_switches=ft3_switches,
    mpft_switches=mpft_switches,
)

# %%
check("bill_network", answers, variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "dispatch_bytes_per_token", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_network", answers, "dispatch_bytes_per_token", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "forward_bytes_per_token", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_network", answers, "forward_bytes_per_token", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "ft2_endpoints", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_network", answers, "ft2_endpoints", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "ft3_switches", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_network", answers, "ft3_switches", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "mpft_switches", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_network", answers, "mpft_switches", variant=VARIANT, seed=seed)
