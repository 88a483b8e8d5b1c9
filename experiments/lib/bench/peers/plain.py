"""The op as anyone would first write it in JAX: a scan over tokens. Nothing of ours is in it.

So that what our implementations are said to be faster than is not another one of them.
"""

import jax
import jax.numpy as jnp


def plain(q, k, v, beta, g=None):
    """Outputs and final state of arrays as `delta_product` takes them, as many heads in each.

    Per token the state [B, H, K, V] decays; every factor reads it by an einsum and adds an outer
    product, and the query reads it by another einsum. Gradients are what JAX derives.

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, R, H, K].
        v: values [B, T, R, H, V].
        beta: step sizes [B, T, R, H].
        g: log decays [B, T, H], or None.
    """
    B, _, R, H, K = k.shape
    V = v.shape[-1]

    def token(state, x):
        q, k, v, beta, g = x
        if g is not None:
            state = state * jnp.exp(g)[..., None, None]
        for r in range(R):
            read = jnp.einsum("bhk,bhkv->bhv", k[:, r], state)
            write = beta[:, r, :, None] * (v[:, r] - read)
            state = state + k[:, r, :, :, None] * write[:, :, None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state) * K**-0.5

    by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, beta, g))
    state, o = jax.lax.scan(token, jnp.zeros((B, H, K, V), jnp.float32), by_token)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state
