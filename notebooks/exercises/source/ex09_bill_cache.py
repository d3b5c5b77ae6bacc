# %% [markdown]
# # Exercise 09 · What a cache keeps of a token
#
# **account** · lesson 03, MLA and the latent cache · 10 points · about 25 minutes
#
# What does the latent cache keep of a token, how much smaller is it than the keys and values it stands for, and for how
# many new tokens at once does absorbing pay?

# %%
from minidsv3.exercises import check

# %% nbgrader={"grade": false, "grade_id": "given", "locked": true, "schema_version": 3, "solution": false, "task": false}
GIVEN = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "bytes_per_number": 2,
    "context": 131072,
}
VARIANT = GIVEN


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def bytes_per_token():
    """what the latent cache keeps of one token, all layers (bytes)."""
    ### BEGIN SOLUTION
    return 61 * (512 + 64) * 2
    ### END SOLUTION


def gib_at_context():
    """the cache of one sequence of `context` tokens (GiB)."""
    ### BEGIN SOLUTION
    return 61 * (512 + 64) * 2 * 131_072 / 2**30
    ### END SOLUTION


def times_smaller():
    """how many times smaller it is than keys [nope | rope] and values of all heads (ratio)."""
    ### BEGIN SOLUTION
    return 128 * (128 + 64 + 128) / (512 + 64)
    ### END SOLUTION


def absorb_up_to():
    """up to how many new tokens absorbing needs fewer FLOPs, for a very long context (new tokens)."""
    ### BEGIN SOLUTION
    return 512 * (128 + 128) / (2 * 512 - (128 + 128))
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %% nbgrader={"grade": false, "grade_id": "answers", "locked": true, "schema_version": 3, "solution": false, "task": false}
answers = dict(
    bytes_per_token=bytes_per_token,
    gib_at_context=gib_at_context,
    times_smaller=times_smaller,
    absorb_up_to=absorb_up_to,
)

# %%
check("bill_cache", answers, variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "bytes_per_token", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_cache", answers, "bytes_per_token", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "gib_at_context", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_cache", answers, "gib_at_context", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "times_smaller", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_cache", answers, "times_smaller", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "absorb_up_to", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_cache", answers, "absorb_up_to", variant=VARIANT, seed=seed)
