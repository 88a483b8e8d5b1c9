"""The recurrence, token by token: the specification that every other implementation must match.

Shape suffixes: B batch, T tokens, R Householder factors per token, H key heads, G value heads per
key head (so Hv = H * G), K key width, V value width. Source: DeltaProduct (Siems et al., 2025),
section 3; the gate multiplies the old state once per token, before the first factor.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype


def recurrent(q, k, v, beta, g, initial_state, resets, *, scale, precision):
    """Scans over tokens; arguments as `delta_product` checked them, ``resets`` [B, T] bool or None.

    Computes in float32 (float64 for float64 inputs) whatever the input dtype. Plain JAX: forward
    and reverse mode both work; reverse mode stores several states per token.
    """

    def body(state_BHvKV, token):
        q, k, v, beta, g, reset = token
        if reset is not None:
            state_BHvKV = jnp.where(reset[:, None, None, None], 0, state_BHvKV)
        o, state_BHvKV = recurrent_step(
            state_BHvKV, q, k, v, beta, g, scale=scale, precision=precision
        )
        return state_BHvKV, o

    # A CPU has no bfloat16: it would convert whole arrays anew for every token.
    wide = jax.tree.map(lambda x: x.astype(accumulator_dtype(x.dtype)), (q, k, v, beta, g))
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*wide, resets))
    final_state, o_TBHvV = jax.lax.scan(body, initial_state, tokens)
    return jnp.moveaxis(o_TBHvV, 0, 1).astype(v.dtype), final_state


def recurrent_step(state, q, k, v, beta, g, *, scale, precision):
    """One token: state <- exp(g) state, then R rank-one corrections, then o = scale * state^T q."""
    matmul = Matmul.wide(q.dtype, precision)
    wide = accumulator_dtype(q.dtype)
    B, R, H, K = k.shape
    G, V = v.shape[-2] // H, v.shape[-1]
    q_BHK, k_BRHK = q.astype(wide), k.astype(wide)
    v_BRHGV = v.astype(wide).reshape(B, R, H, G, V)
    beta_BRHG = beta.astype(wide).reshape(B, R, H, G)
    state_BHGKV = state.reshape(B, H, G, K, V)
    if g is not None:
        state_BHGKV *= jnp.exp(g.astype(wide)).reshape(B, H, G, 1, 1)
    for r in range(R):
        prediction_BHGV = matmul("bhk,bhgkv->bhgv", k_BRHK[:, r], state_BHGKV)
        write_BHGV = beta_BRHG[:, r, ..., None] * (v_BRHGV[:, r] - prediction_BHGV)
        state_BHGKV += k_BRHK[:, r, :, None, :, None] * write_BHGV[..., None, :]
    o_BHGV = scale * matmul("bhk,bhgkv->bhgv", q_BHK, state_BHGKV)
    return o_BHGV.reshape(B, H * G, V).astype(v.dtype), state_BHGKV.reshape(state.shape)
