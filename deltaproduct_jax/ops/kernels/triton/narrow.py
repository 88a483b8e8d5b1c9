"""The GPU kernels of narrow heads: what is launched on which arrays. One kernel each way.

They take many heads of small states, of which each has a program of its own; see
NARROW.md. The contract of `forward` and `backward` is that of `deltaproduct_jax.ops.kernels`.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.triton import passes, tiling
from deltaproduct_jax.ops.kernels.triton.batching import batched
from deltaproduct_jax.ops.kernels.triton.mend import gates, mended
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.precision import L2NORM_EPSILON

MOST_WIDTH = 32
# From as many on a walk of their own pays: eight or so are under way on each of 132
# multiprocessors.
FEWEST_HEADS = 1024
# Numbers of a token, of which a block's offsets have 32 bits.
WIDEST_TOKEN = (2**31 - 1) // tiling.NARROW_ROWS
# Of float32, cut into terms of bfloat16: two have 16 bits, three all 24.
TERMS = {None: 3, "high": 3, "default": 2}


def takes(tokens: Tokens, options: Options) -> bool:
    """Whether these are narrow heads, and enough of them to fill a GPU."""
    B, T, _, H, K = tokens.k.shape
    Hv, V = tokens.v.shape[-2:]
    is_narrow = all(x.dtype in passes.NARROW for x in tokens[:3])
    precisions = (None, "default") if is_narrow else TERMS
    return (
        max(K, V) <= MOST_WIDTH
        and T > 0
        and B * Hv >= FEWEST_HEADS
        and max(H * K, Hv * V) <= WIDEST_TOKEN
        and (options.precision in precisions)
    )


def takes_gradients(tokens: Tokens, options: Options) -> bool:
    """The same of gradients, which need room for more than states."""
    return options.more and takes(tokens, options)


class _Call:
    """Sizes of one call, and its launches."""

    def __init__(self, tokens: Tokens, options: Options) -> None:
        q, k, v = tokens[:3]
        B, T, R, H, K = k.shape
        HV, V = v.shape[-2:]
        parts = 1 if q.dtype in passes.NARROW else TERMS[options.precision]
        which = {"HAS_G": tokens.g is not None, "HAS_RESETS": tokens.resets is not None}
        self.tokens = tokens
        self.forward, self.backward = tiling.narrow_launches(parts, decays=any(which.values()))
        M = tiling.NARROW_ROWS
        C = M // R
        self.N = -(-T // C)
        self.sizes = B, T, R, H, HV, K, V
        self.meta = {
            **{"SCALE": options.scale, "T": T, "R": R, "H": H, "HV": HV, "K": K, "V": V},
            **{"BK": tiling.power_of_two(K), "BV": tiling.power_of_two(V)},
            # Tokens rounded up to rows that a product has, and to those that it adds up over.
            **{"C": C, "CQ": max(8, 1 << (C - 1).bit_length()), "CP": tiling.power_of_two(C)},
            **{"M": M, "N": self.N, "PARTS": parts, **which},
            **{"RAW": options.raw, "EPSILON": L2NORM_EPSILON},
        }

    def kept(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """States before blocks, transposed, and X of blocks."""
        B, _, _, _, HV, K, V = self.sizes
        M, dtype = self.meta["M"], self.tokens.q.dtype
        return (
            jax.ShapeDtypeStruct((B, HV, self.N, V, K), dtype),
            jax.ShapeDtypeStruct((B, HV, self.N, M, M), dtype),
        )

    def inputs(self):
        """The arrays that both kernels read."""
        return *self.tokens[:4], *gates(self.tokens)

    def launch(self, name: str, arrays, outs, launch, **more):
        """Launches a kernel, one program for each value head."""
        B, *_, HV, _, _ = self.sizes
        return passes.call(name, arrays, outs, (B * HV,), launch, meta={**self.meta, **more})


def kept_more(tokens: Tokens, options: Options) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a gradient keeps."""
    return _Call(tokens, options).kept()


def forward(tokens: Tokens, initial_state: jax.Array, options: Options, *, keep_states: bool):
    """Outputs [B, T, Hv, V], final state [B, Hv, K, V], and what `backward` needs."""
    fixed = options, keep_states
    o, final_state, kept = batched(_walk_heads, fixed)(tokens, initial_state)
    return o, final_state, kept if keep_states else None


def backward(tokens: Tokens, kept: tuple[jax.Array, ...], do, dfinal_state, options: Options):
    """Cotangents of the tokens, dq and dk by value head, and of the state before the only piece."""
    return batched(_walk_heads_back, options)(tokens, kept, do, dfinal_state)


def _walk_heads(fixed: tuple[Options, bool], tokens: Tokens, initial_state):
    options, keeps = fixed
    call = _Call(tokens, options)
    B, T, _, H, HV, K, V = call.sizes
    o = jax.ShapeDtypeStruct((B, T, HV, V), tokens.v.dtype)
    final = jax.ShapeDtypeStruct((B, HV, K, V), jnp.float32)
    kept = call.kept() if keeps else 2 * (passes.PLACEHOLDER,)
    arrays = (*call.inputs(), initial_state)
    slots = (options.slots or options.spans, B, H, HV // H, K, V) if keeps else (1, B, 1, 1, 1, 1)
    more = slots, (B, HV, 1)
    outs = (o, final, *kept, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in more))
    launched = call.launch("narrow_forward", arrays, outs, call.forward, KEEPS=keeps)
    o, final, *kept, slots, told = launched
    arrays = tokens, initial_state, told, o, final[:, :, None]
    o, final = mended(passes.call, *arrays, options, block=call.meta["C"])
    return o, final, (slots, *kept) if keeps else (slots,)


def _walk_heads_back(options: Options, tokens: Tokens, kept, do, dfinal_state):
    call = _Call(tokens, options)
    _, states, x = kept
    g = tokens.g
    outs = (
        *passes.of_value_heads(tokens),
        passes.PLACEHOLDER if g is None else jax.ShapeDtypeStruct(g.shape, g.dtype),
        jax.ShapeDtypeStruct(dfinal_state.shape, jnp.float32),
    )
    arrays = (*call.inputs(), states, x, do, dfinal_state)
    launched = call.launch("narrow_backward", arrays, outs, call.backward)
    *dtokens, dg, dstate = launched
    return Tokens(*dtokens, None if g is None else dg, None), dstate[:, :, None]
