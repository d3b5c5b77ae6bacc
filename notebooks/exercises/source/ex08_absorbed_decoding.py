# %% [markdown]
# # Exercise 08 · Absorbed decoding over a latent cache
#
# **implement** · lesson 03, MLA and the latent cache · 10 points · about 35 minutes
#
# One new token attends to L cached ones. The cache holds latents $c_j$ and rotated key parts $k^R_j$. Head h has keys
# $W^{UK}_h c_j$ and values $W^{UV}_h c_j$; the score is $\mathrm{scale}\,(q_{nope} \cdot W^{UK}_h c_j + q_{rope} \cdot k^R_j)$.
#
# Do not make keys and values: move $W^{UK}_h$ into the query and $W^{UV}_h$ behind the weighted sum (DeepSeek-V2, section 2.1.2).

# %%
import numpy as np

from minidsv3.exercises import check


# %% nbgrader={"grade": false, "grade_id": "solution", "locked": false, "schema_version": 3, "solution": true, "task": false}
def absorbed(q, latent, k_rope, w_uk, w_uv, scale):
    """q [H, d_n + d_r], latent [L, r], k_rope [L, d_r], w_uk [H, d_n, r], w_uv [H, d_v, r] -> [H, d_v]."""
    ### BEGIN SOLUTION
    d_n = w_uk.shape[1]
    query = np.einsum("hn,hnr->hr", q[:, :d_n], w_uk)
    scores = scale * (query @ latent.T + q[:, d_n:] @ k_rope.T)  # [H, L]
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.einsum("hr,hvr->hv", p @ latent, w_uv)
    ### END SOLUTION


# %% [markdown]
# Check as often as you like: one line a property, with the smallest case that fails.

# %%
check("absorbed_decoding", absorbed)

# %% [markdown]
# The cells below are the graded ones: one property each, with other sizes and numbers when it is graded. The last,
# `golden`, is a stored case and stays as it is.

# %% nbgrader={"grade": true, "grade_id": "one_token", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("absorbed_decoding", absorbed, "one_token", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "position", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("absorbed_decoding", absorbed, "position", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "naive", "locked": true, "points": 3, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("absorbed_decoding", absorbed, "naive", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "memory", "locked": true, "points": 2, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("absorbed_decoding", absorbed, "memory", seed=seed)

# %% nbgrader={"grade": true, "grade_id": "golden", "locked": true, "points": 1, "schema_version": 3, "solution": false, "task": false}
seed = 0
### BEGIN HIDDEN TESTS
seed = 1
### END HIDDEN TESTS
check("absorbed_decoding", absorbed, "golden", seed=seed)
