"""Which GPU kernels run a call: of narrow heads, in Gluon where they take it, else the others.

The module of "triton" in the table of `deltaproduct_jax.ops.kernels`, whose contract it keeps.
"""

import jax

from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.gluon import passes as gluon
from deltaproduct_jax.ops.kernels.triton import looking, narrow
from deltaproduct_jax.ops.kernels.triton import passes as triton
from deltaproduct_jax.ops.kernels.triton.batching import batched
from deltaproduct_jax.ops.kernels.triton.passes import compute_capability
from deltaproduct_jax.ops.kernels.triton.passes import is_ready as is_ready
from deltaproduct_jax.ops.kernels.triton.passes import kept_span as kept_span
from deltaproduct_jax.ops.kernels.triton.passes import step as step
from deltaproduct_jax.ops.kernels.triton.passes import unsupported as unsupported
from deltaproduct_jax.ops.layout import Tokens


def takes_raw(tokens: Tokens, options: Options) -> bool:
    """Whether what runs a gradient of these can have ``options.raw``."""
    return narrow.takes_raw(tokens, options)


def kept_more(tokens: Tokens, options: Options) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What those that run a gradient of these keep beside states."""
    if narrow.takes(tokens, options):
        return narrow.kept_more(tokens, options)
    if gluon.takes_gradients(tokens, options, compute_capability()):
        return gluon.kept_more(tokens, options)
    return triton.kept_more(tokens, options)


def forward(tokens: Tokens, initial_state: jax.Array, options: Options, *, keep_states: bool):
    """Outputs [B, T, Hv, V], final state [B, Hv, K, V], what `backward` needs, and bad rows."""
    whole = looking.whole(tokens, options)
    if (narrow.takes_gradients if keep_states else narrow.takes)(whole, options):
        run = narrow.forward
    elif not keep_states and gluon.takes(tokens, options, compute_capability()):
        o, final_state, seen = batched(gluon.forward, _fixed_of_gluon(tokens, options))(
            tokens, initial_state
        )
        return o, final_state, None, _told(tokens, options, seen)
    elif keep_states and _by_gluon(tokens, options):
        run = batched(gluon.forward_kept, _fixed_of_gluon(tokens, options))
        o, final_state, seen, kept = run(tokens, initial_state)
        return o, final_state, kept, _told(tokens, options, seen)
    else:
        run = triton.forward
    o, final_state, kept, seen = run(tokens, initial_state, options, keep_states=keep_states)
    return o, final_state, kept, _told(tokens, options, seen)


def backward(tokens: Tokens, kept: tuple[jax.Array, ...], do, dfinal_state, options: Options):
    """Cotangents of the tokens and of the initial state, from residuals, and bad rows."""
    *kept, flags = kept
    kept = tuple(kept)
    if narrow.takes_gradients(looking.whole(tokens, options), options):
        dtokens, dstate, seen = narrow.backward(tokens, kept, do, dfinal_state, options)
    elif _by_gluon(tokens, options):
        run = batched(gluon.backward, _fixed_of_gluon(tokens, options))
        dtokens, dstate, seen = run(tokens, kept, do, dfinal_state)
    else:
        dtokens, dstate, seen = triton.backward(tokens, kept, do, dfinal_state, options)
    seen += flags.reshape(*flags.shape, *[1] * (seen.ndim - 2))
    return dtokens, dstate, _told(tokens, options, seen)


def _told(tokens: Tokens, options: Options, seen: jax.Array) -> jax.Array | None:
    """What kernels told, if they looked."""
    return seen if looking.looks(tokens, options) else None


def _fixed_of_gluon(tokens: Tokens, options: Options):
    return gluon.fixed(looking.whole(tokens, options), options)


def _by_gluon(tokens: Tokens, options: Options) -> bool:
    """Whether the kernels in Gluon run a gradient of these."""
    return options.more and gluon.takes_gradients(tokens, options, compute_capability())
