"""What is not finite stays in its segment, backward: bad rows and heads are done again on the GPU.

Behind the kernels of a pass one more is launched, always. Of a row and head of which all is finite
it reads a few numbers, and no host waits. The bodies are in `anew.gradients`, which needs Triton
and is imported at the first launch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.triton import tiling
from deltaproduct_jax.ops.kernels.triton.tiling import Launch
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.precision import L2NORM_EPSILON

# Numbers of a state that a program has in registers at a time, and of them those of a warp.
STATE_AT_ONCE = 8192
STATE_OF_A_WARP = 1024
# All programs are to run at once, one on each multiprocessor. A program does bad heads one after
# the other, so it looks at no more than these.
PROGRAMS = 132
MOST_HEADS = 32
LOOKED_AT = 64  # tokens from one of which something is read to the next
LOOKS_AT_ONCE = 256  # numbers of a program


def mended(
    call: Callable,
    tokens: Tokens,
    initial_state: jax.Array,
    do: jax.Array,
    dfinal_state: jax.Array,
    dtokens: Tokens,
    dstates: jax.Array,
    options: Options,
) -> tuple[Tokens, jax.Array]:
    """The gradients, in place, contained as `ops.containment.Watched` says.

    Args:
      call: `passes.call`.
      tokens: as the kernels of the pass took them, q, k and v also before SiLU (``options.raw``).
      initial_state: [B, Hv, K, V]; what is not finite in it counts.
      do: cotangent of the outputs, [B, T, Hv, V].
      dfinal_state: cotangent of the final state, [B, Hv, K, V].
      dtokens: what the kernels found; dq and dk are those of value heads, [B, T, Hv, K] and
        [B, T, R, Hv, K], not yet added up over groups. dv has the dtype of v. Where anything is
        not finite, dbeta must tell: see `anew.gradients.mend_back_in_place`.
      dstates: [B, Hv, pieces, K, V], float32, of states before the pieces of the sequence.
      options: what the kernels were told.

    Returns:
      dtokens, and the cotangent of the initial state, [B, Hv, K, V]; of rows and heads of which
      anything is not finite they are found anew.
    """
    q, k, v, beta, g, resets = tokens
    B, T, R, H, K = k.shape
    HV, V = v.shape[-2:]
    BK, ALL_V = tiling.power_of_two(K), tiling.power_of_two(V)
    BV = min(ALL_V, STATE_AT_ONCE // BK)
    looks = min(MOST_HEADS, 1 << (-(-B * HV // PROGRAMS) - 1).bit_length())
    looked_at = 1 << (-(-T // LOOKED_AT) - 1).bit_length()
    meta = {
        **{"SCALE": options.scale, "T": T, "R": R, "H": H, "HV": HV, "K": K, "BK": BK, "V": V},
        **{"BV": BV, "ALL_V": ALL_V, "HEADS": B * HV, "LOOKS": looks},
        **{"LOOKED_AT": LOOKED_AT, "AT_ONCE": min(looked_at, LOOKS_AT_ONCE // looks)},
        # A state takes so many rows of dv, in which it is kept.
        "SPAN": -(-K * (4 // dtokens.v.dtype.itemsize) // R),
        "PIECES": dstates.shape[2],
        **{"HAS_G": g is not None, "HAS_RESETS": resets is not None},
        **{"RAW": options.raw, "EPSILON": L2NORM_EPSILON},
    }
    given = (*dtokens[:4], jnp.zeros(1, jnp.float32) if g is None else dtokens.g, dstates)
    resets = beta if resets is None else resets.astype(jnp.int8)
    arrays = (q, k, v, beta, beta if g is None else g, resets, initial_state, do, dfinal_state)
    outs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given)
    found = call(
        "mend_back",
        (*arrays, *given),
        outs,
        (-(-B * HV // looks),),
        Launch(max(2, BK * BV // STATE_OF_A_WARP), stages=1),
        meta=meta,
        aliases={len(arrays) + i: i for i in range(len(given))},
    )
    *of_tokens, dg, dstates = found
    return Tokens(*of_tokens, None if g is None else dg, None), dstates[:, :, 0]
