"""Which GPU kernels run a call: of narrow heads, in Gluon where they take it, else the others.

The module of "triton" in the table of `deltaproduct_jax.ops.kernels`, whose contract it keeps.
"""

import functools

import jax

from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.gluon import passes as gluon
from deltaproduct_jax.ops.kernels.triton import narrow
from deltaproduct_jax.ops.kernels.triton import passes as triton
from deltaproduct_jax.ops.kernels.triton.batching import batched
from deltaproduct_jax.ops.kernels.triton.mend_back import mended
from deltaproduct_jax.ops.kernels.triton.passes import compute_capability
from deltaproduct_jax.ops.kernels.triton.passes import is_ready as is_ready
from deltaproduct_jax.ops.kernels.triton.passes import kept_span as kept_span
from deltaproduct_jax.ops.kernels.triton.passes import step as step
from deltaproduct_jax.ops.kernels.triton.passes import unsupported as unsupported
from deltaproduct_jax.ops.layout import Tokens


def takes_raw(tokens: Tokens, options: Options) -> bool:
    """Whether what runs a gradient of these makes SiLU, and lengths of q and k, itself."""
    return narrow.takes(tokens, options)


def kept_more(tokens: Tokens, options: Options) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What those that run a gradient of these keep beside states."""
    if narrow.takes(tokens, options):
        return narrow.kept_more(tokens, options)
    if gluon.takes_gradients(tokens, options, compute_capability()):
        return gluon.kept_more(tokens, options)
    return triton.kept_more(tokens, options)


def forward(tokens: Tokens, initial_state: jax.Array, options: Options, *, keep_states: bool):
    """Outputs [B, T, Hv, V], final state [B, Hv, K, V], what `backward` needs, and None.

    No row is to run again: what is not finite is seen to on the GPU.
    """
    run = functools.partial(triton.forward, keep_states=keep_states)
    if (narrow.takes_gradients if keep_states else narrow.takes)(tokens, options):
        run = functools.partial(narrow.forward, keep_states=keep_states)
    elif not keep_states and gluon.takes(tokens, options, compute_capability()):
        run = batched(gluon.forward, gluon.fixed(tokens, options))
        return *run(tokens, initial_state), None, None
    elif keep_states and _by_gluon(tokens, options):
        run = batched(gluon.forward_kept, gluon.fixed(tokens, options))
        return *run(tokens, initial_state), None
    return *run(tokens, initial_state, options), None


def backward(tokens: Tokens, kept: tuple[jax.Array, ...], do, dfinal_state, options: Options):
    """Cotangents of the tokens and of the initial state, from residuals, and None."""
    *kept, initial_state = kept[: len(kept) - ("pallas_tpu" in options.kernels)]
    kept = tuple(kept)
    if narrow.takes_gradients(tokens, options):
        dtokens, dstates = narrow.backward(tokens, kept, do, dfinal_state, options)
    elif _by_gluon(tokens, options):
        run = batched(gluon.backward, gluon.fixed(tokens, options))
        dtokens, dstates = run(tokens, kept, do, dfinal_state)
    else:
        dtokens, dstates = triton.backward(tokens, kept, do, dfinal_state, options)
    arrays = tokens, initial_state, do, dfinal_state, dtokens, dstates
    dtokens, dstate = batched(_mended, options)(*arrays)
    dq, dk = triton.summed_over_groups(dtokens.q, dtokens.k, tokens)
    return dtokens._replace(q=dq, k=dk), dstate, None


def _mended(options: Options, *arrays):
    return mended(triton.call, *arrays, options)


def _by_gluon(tokens: Tokens, options: Options) -> bool:
    """Whether the kernels in Gluon run a gradient of these."""
    return options.more and gluon.takes_gradients(tokens, options, compute_capability())
