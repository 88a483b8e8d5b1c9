"""A log-depth scan over the affine maps of the tokens, S -> A_t S + B_t.

The products of the A_t cost K^3 per token, so this never wins on time; it is here because it is
short, plain JAX (forward-mode differentiation included) and independent of the chunked form. Shape
suffixes as in recurrent.py.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype


def associative(q, k, v, beta, g, initial_state, resets, *, scale, precision):
    """Arguments and results as `recurrent`; memory holds a [K, K] and a [K, V] matrix per token."""
    matmul = Matmul.wide(q.dtype, precision)
    wide = accumulator_dtype(q.dtype)
    B, T, R, H, K = k.shape
    Hv, V = v.shape[-2:]
    G = Hv // H
    A_BTHGKK, B_BTHGKV = _affine_maps(
        k.astype(wide),
        v.astype(wide).reshape(B, T, R, H, G, V),
        beta.astype(wide).reshape(B, T, R, H, G),
        None if g is None else g.astype(wide).reshape(B, T, H, G),
        matmul,
    )
    if resets is not None:
        A_BTHGKK = jnp.where(resets[:, :, None, None, None, None], 0, A_BTHGKK)

    def compose(earlier, later):
        (A1, B1), (A2, B2) = earlier, later
        A = matmul("...ij,...jk->...ik", A2, A1)
        return A, matmul("...ij,...jv->...iv", A2, B1) + B2

    A_BTHGKK, states_BTHGKV = jax.lax.associative_scan(compose, (A_BTHGKK, B_BTHGKV), axis=1)
    state_BHGKV = initial_state.reshape(B, H, G, K, V)
    states_BTHGKV += matmul("bthgij,bhgjv->bthgiv", A_BTHGKK, state_BHGKV)
    o_BTHGV = scale * matmul("bthk,bthgkv->bthgv", q, states_BTHGKV)
    final_state = states_BTHGKV[:, -1].reshape(initial_state.shape)
    return o_BTHGV.reshape(B, T, Hv, V).astype(v.dtype), final_state


def _affine_maps(k_BTRHK, v_BTRHGV, beta_BTRHG, g_BTHG, matmul):
    """A_t = exp(g_t) (I - beta_R k_R k_R^T) ... (I - beta_1 k_1 k_1^T), and B_t without g."""
    B, T, R, H, K = k_BTRHK.shape
    G, V = v_BTRHGV.shape[-2:]
    A = jnp.broadcast_to(jnp.eye(K, dtype=k_BTRHK.dtype), (B, T, H, G, K, K))
    if g_BTHG is not None:
        A *= jnp.exp(g_BTHG)[..., None, None]
    Bt = jnp.zeros((B, T, H, G, K, V), k_BTRHK.dtype)
    for r in range(R):
        k_BTHK, beta_BTHG = k_BTRHK[:, :, r], beta_BTRHG[:, :, r]
        # Outer products by einsum: of a broadcast product the transposition is a sum of products,
        # which at rank 7, under vmap, ends the process on a CPU (see _sum_of_group in chunked.py).
        write_BTHGK = beta_BTHG[..., None] * k_BTHK[..., None, :]
        read_BTHGK = matmul("bthk,bthgkj->bthgj", k_BTHK, A)
        A -= matmul("bthgk,bthgj->bthgkj", write_BTHGK, read_BTHGK)
        error_BTHGV = v_BTRHGV[:, :, r] - matmul("bthk,bthgkv->bthgv", k_BTHK, Bt)
        Bt += matmul("bthgk,bthgv->bthgkv", write_BTHGK, error_BTHGV)
    return A, Bt
