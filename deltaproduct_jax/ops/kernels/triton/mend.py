"""What is launched behind the passes of GPU kernels, so that what is not finite stays in place.

A host that asked whether anything is bad would wait for the answer; a kernel that has nothing to do
takes a GPU microseconds. The bodies are in `anew.outputs`, which needs Triton.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.triton import tiling
from deltaproduct_jax.ops.kernels.triton.tiling import Launch
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.precision import L2NORM_EPSILON

PROGRAMS = 256  # of fewer a GPU has room for more
LOOKED_AT = 2048  # numbers of a program at once, at most
STATE = 8192  # numbers of a state that a program has in registers
WARPS = 4


def gates(tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """g and resets; kernels do not look at what stands for a missing one."""
    g = tokens.beta if tokens.g is None else tokens.g
    return g, tokens.beta if tokens.resets is None else tokens.resets.astype(jnp.int8)


def mended(
    call: Callable, tokens: Tokens, initial_state, told, o, states, options: Options, *, block: int
) -> tuple[jax.Array, jax.Array]:
    """Outputs and the final state, in place of what a forward pass of kernels made of them.

    Args:
      call: `passes.call`.
      tokens, initial_state: what the pass took.
      told: [B, Hv, ...] float32: 0, some NaN if of a query of the head something is not finite.
      o: [B, T, Hv, V], what it wrote.
      states: [B, Hv, pieces, K, V] float32, states after the pieces of the sequence.
      options: as the pass had them; of operands that are known to be finite nothing is launched.
      block: of how many tokens the pass makes products; a multiple of it will do.
    """
    if options.known_finite:
        return o, states[:, :, -1]
    B, T, R, H, K = tokens.k.shape
    HV, V, pieces = *tokens.v.shape[-2:], states.shape[2]
    BK, BV = tiling.power_of_two(K), tiling.power_of_two(V)
    at_once = max(1, min(tiling.power_of_two(B * HV) // PROGRAMS, LOOKED_AT // BV))
    numbers = math.prod(told.shape[2:])
    numbers_at_once = min(1 << (numbers - 1).bit_length(), LOOKED_AT // at_once)
    meta = {
        **{"SCALE": options.scale, "HEADS": B * HV, "AT_ONCE": at_once},
        **{"TOLD": numbers, "TOLD_AT_ONCE": numbers_at_once},
        **{"T": T, "R": R, "H": H, "HV": HV, "K": K, "BK": BK, "V": V, "BV": BV},
        **{"COLUMNS": max(16, min(BV, STATE // BK)), "C": block, "PIECES": pieces},
        **{"HAS_G": tokens.g is not None, "HAS_RESETS": tokens.resets is not None},
        **{"RAW": options.raw, "EPSILON": L2NORM_EPSILON},
    }
    q, k, v, beta, *_ = tokens
    # Whole arrays in place, no parts of them: XLA may hand on where a part lies, and then what is
    # written there is not what it reads.
    arrays = (q, k, v, beta, *gates(tokens), initial_state, told, o, states)
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (o, states)]
    in_place = {len(arrays) - 2: 0, len(arrays) - 1: 1}
    launch, grid = Launch(WARPS, stages=1), (-(-B * HV // at_once),)
    o, states = call("mend", arrays, outs, grid, launch, meta=meta, aliases=in_place)
    return o, states[:, :, -1]
