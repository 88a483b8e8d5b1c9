"""Which rows of a call of the GPU kernels are not finite: small sums over what they return.

No kernel chooses between numbers by a mask, so what is bad once stays in a state: the final state
tells of keys, values, step sizes, decays and the state before, the cotangent of that one of queries
and cotangents too. A query alone shows in all columns of its own output, of which one is read, and
a decay in front of a boundary may show nowhere.

Whoever looks has to be waited for: XLA asks the GPU before every turn of a loop. No GPU has run
this yet, so that nothing chooses it but `choose_containment`.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.layout import Tokens


class _Choice:
    """Whether rows that are not finite are run again."""

    looks = False


def choose_containment(chosen: bool) -> None:
    """Lets "triton" keep what is not finite in its segment, or not any more.

    For measurements, before anything is traced: programs of before are forgotten.
    """
    if chosen != _Choice.looks:
        _Choice.looks = chosen
        jax.clear_caches()


def after_forward(tokens: Tokens, o: jax.Array, final_state: jax.Array) -> jax.Array | None:
    """[B] bool, or None where nobody looks; arguments and results as those of `passes.forward`."""
    if not _Choice.looks:
        return None
    wrong_BTH = o[..., 0] - o[..., 0]
    if tokens.g is not None:
        wrong_BTH += (tokens.g - tokens.g).astype(wrong_BTH.dtype)
    return jnp.any(wrong_BTH != 0, axis=(1, 2)) | _of_state(final_state)


def after_backward(dinitial_state: jax.Array, flags_BH: jax.Array) -> jax.Array | None:
    """The same for `passes.backward`, of rows that were run again forward too."""
    if not _Choice.looks:
        return None
    return _of_state(dinitial_state) | jnp.any(flags_BH != 0, axis=1)


def _of_state(state_BHKV: jax.Array) -> jax.Array:
    return jnp.any(state_BHKV - state_BHKV != 0, axis=(1, 2, 3))


def whole(tokens: Tokens, options: Options) -> Tokens:
    """Shapes of the call that these are rows of: what is kept of one is cut as that is."""
    rows = options.rows or tokens.q.shape[0]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), tokens)
