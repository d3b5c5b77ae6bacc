# %% [markdown]
# # Exercise 01 · The parameters of a model, part by part
#
# **account** · lesson 00, the tour · 10 points · about 40 minutes
#
# Count the parameters of a model from its sizes, the names are those of `config.json`. Norms are small, but there:
# two of D a layer, two inside each MLA, one at the end. Nothing has a bias (the gate's correction bias is a buffer).

# %%
from minidsv3.exercises import check

# %% nbgrader={"grade": false, "grade_id": "given", "locked": true, "schema_version": 3, "solution": false, "task": false}
GIVEN = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
}
VARIANT = GIVEN


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def mla_per_layer():
    """weights of one MLA, its two latent norms left out or not (parameters)."""
    ### BEGIN SOLUTION
    return (
        7168 * 1536
        + 1536
        + 1536 * 128 * (128 + 64)
        + 7168 * (512 + 64)
        + 512
        + 512 * 128 * (128 + 128)
        + 128 * 128 * 7168
    )
    ### END SOLUTION


def dense_ffn():
    """the FFN of one dense layer (parameters)."""
    ### BEGIN SOLUTION
    return 3 * 7168 * 18432
    ### END SOLUTION


def moe_ffn():
    """the experts and the gate of one layer with experts, bias left out (parameters)."""
    ### BEGIN SOLUTION
    return (256 + 1) * 3 * 7168 * 2048 + 256 * 7168
    ### END SOLUTION


def total():
    """the whole model without MTP, norms within 1e-6 (parameters)."""
    ### BEGIN SOLUTION
    return 2 * 129280 * 7168 + 7168 + 61 * (187_107_328 + 2 * 7168) + 3 * dense_ffn() + 58 * moe_ffn()
    ### END SOLUTION


def active():
    """what one token uses, with the head and without the embedding (parameters)."""
    ### BEGIN SOLUTION
    return (
        129280 * 7168
        + 7168
        + 61 * (187_107_328 + 2 * 7168)
        + 3 * dense_ffn()
        + 58 * ((8 + 1) * 3 * 7168 * 2048 + 256 * 7168)
    )
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %% nbgrader={"grade": false, "grade_id": "answers", "locked": true, "schema_version": 3, "solution": false, "task": false}
answers = dict(
    mla_per_layer=mla_per_layer,
    dense_ffn=dense_ffn,
    moe_ffn=moe_ffn,
    total=total,
    active=active,
)

# %%
check("bill_parameters", answers, variant=VARIANT)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded.

# %% nbgrader={"grade": true, "grade_id": "mla_per_layer", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_parameters", answers, "mla_per_layer", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "dense_ffn", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_parameters", answers, "dense_ffn", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "moe_ffn", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_parameters", answers, "moe_ffn", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "total", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_parameters", answers, "total", variant=VARIANT, seed=seed)

# %% nbgrader={"grade": true, "grade_id": "active", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("bill_parameters", answers, "active", variant=VARIANT, seed=seed)
