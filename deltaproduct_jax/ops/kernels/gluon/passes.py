"""What the Gluon kernels take, and how a pass is made of their launches."""

import functools
import importlib.metadata
import sys

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.gluon import launch
from deltaproduct_jax.ops.kernels.gluon.launch import Tile
from deltaproduct_jax.ops.layout import Tokens

GROUP = 64  # tokens
WIDTHS = (64, 128)
# Programs with more than half of the shared memory: one a multiprocessor of an H100 or H200.
PROGRAMS_AT_ONCE = 132
GROUPS_IN_A_PIECE = 4
MOST_PIECES = 24
STAGES = 3
# So that five programs of `inverse` share a multiprocessor, each of which mostly waits.
INVERSE_REGISTERS = 96
PLACEHOLDER = jax.ShapeDtypeStruct((8,), jnp.float32)


@functools.cache
def has_versions() -> bool:
    """Whether Python, JAX and Triton are new enough: older ones do not compile or launch these."""
    try:
        triton = _release(importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return False
    new_enough = _release(jax.__version__) >= (0, 11) and triton >= (3, 7)
    return sys.version_info >= (3, 12) and new_enough and launch.is_supported()


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(x) for x in version.split(".")[:2])


def takes(tokens: Tokens, options: Options, capability: int) -> bool:
    """Whether the kernels run these, on a GPU of this compute capability."""
    B, T, R, _, K = tokens.k.shape
    Hv, V = tokens.v.shape[-2:]
    narrow = all(x.dtype == jnp.bfloat16 for x in tokens[:3])
    return (
        capability == launch.COMPUTE_CAPABILITY
        and has_versions()
        and narrow
        and options.precision in (None, "default")
        and {K, V} <= set(WIDTHS)
        and T > 0
        and R <= 8
        and 0 < B * Hv <= 65535
    )


class Call:
    """Sizes of one call, and its launches."""

    def __init__(self, tokens: Tokens, options: Options) -> None:
        """Reads the sizes."""
        from deltaproduct_jax.ops.kernels.gluon import prepare, walk

        self.tokens = tokens
        B, T, R, H, K = tokens.k.shape
        HV, V = tokens.v.shape[-2:]
        self.NG = -(-T // GROUP)
        self.prepare, self.walk = prepare, walk
        self.pieces = pieces_for(B * HV, self.NG)
        self.gates = {"HAS_G": tokens.g is not None, "HAS_RESETS": tokens.resets is not None}
        self.meta = {"SCALE": options.scale, "T": T, "R": R, "H": H, "HV": HV, "K": K, "V": V}
        self.meta |= {"NG": self.NG, **self.gates}
        self.B, self.HV, self.K, self.V = B, HV, K, V

        T, R, columns = self.meta["T"], self.meta["R"], (H * K, HV * V)
        blocks = self.NG * R
        self.tiles = {
            "q": Tile((B, T, columns[0]), GROUP, K),
            "k": Tile((B, T * R, columns[0]), GROUP, K),
            "v": Tile((B, T * R, columns[1]), GROUP, 64),
            "x_out": Tile((B * HV, blocks * 2 * 64, 64), 32, 32),
            "x": Tile((B * HV, blocks * 2 * 64, 64), 64, 64),
            "o": Tile((B, T, columns[1]), GROUP, 64),
        }

    def launch(self, kernel, arrays, outs, grid, *, warps=4, registers=None, **more):
        """Launches a kernel with those of ``meta`` and ``more`` that it takes."""
        names = kernel.arg_names
        meta = {name: x for name, x in (self.meta | more).items() if name in names}
        tiles = {name: x for name, x in self.tiles.items() if name in names}
        how = {"warps": warps, "registers": registers, "tiles": tiles}
        return launch.launch(kernel, arrays, outs, grid, **how, **meta)

    def sums(self) -> jax.Array:
        """Sums of gates and resets [B, Hv, groups, 3, 64]; nothing if there are neither."""
        g, resets = self.tokens.g, self.tokens.resets
        out = jax.ShapeDtypeStruct((self.B, self.HV, self.NG, 3, GROUP), jnp.float32)
        if g is None and resets is None:
            return jnp.zeros(PLACEHOLDER.shape, PLACEHOLDER.dtype)
        beta = self.tokens.beta
        arrays = (beta if g is None else g, beta if resets is None else resets.astype(jnp.int8))
        heads = min(4, 1 << (self.HV - 1).bit_length())
        grid = (self.NG, self.B, -(-self.HV // heads))
        return self.launch(self.prepare.gate_sums, arrays, [out], grid, warps=1, HEADS=heads)[0]

    def inverse(self, sums: jax.Array) -> jax.Array:
        """X of every block in two terms, [B, Hv, blocks, 2, 64, 64]."""
        blocks = self.NG * self.meta["R"]
        out = jax.ShapeDtypeStruct((self.B, self.HV, blocks, 2, 64, 64), jnp.bfloat16)
        grid = (-(-blocks // 2), self.B * self.HV)
        arrays = (self.tokens.k, self.tokens.beta, sums)
        return self.launch(self.prepare.inverse, arrays, [out], grid, registers=INVERSE_REGISTERS)[
            0
        ]

    def states(self, pieces: int, V: int) -> jax.ShapeDtypeStruct:
        """A state a piece."""
        return jax.ShapeDtypeStruct((self.B, self.HV, pieces, self.K, V), jnp.float32)

    def walked(self, x, sums, start, *, has_o: bool, has_v: bool, mode: str):
        """Outputs and the states after pieces."""
        q, k, v, beta = self.tokens[:4]
        first, count, pieces = {
            "whole": (0, self.pieces, self.pieces),
            "ends": (0, self.pieces - 1, self.pieces),
            "maps": (1, self.pieces - 2, self.pieces - 2),
        }[mode]
        V = self.V if has_v else self.K
        shape = (self.B, self.meta["T"], self.HV, V) if has_o else PLACEHOLDER.shape
        o = jax.ShapeDtypeStruct(shape, v.dtype)
        more = {
            "STEPS": -(-self.NG // self.pieces),
            **{"FIRST": first, "PIECES": pieces, "S": STAGES, "V": V},
            **{"HAS_O": has_o, "HAS_V": has_v, "START": mode},
        }
        arrays = (q, k, v, x, beta, sums, start)
        outs = [o, self.states(pieces, V)]
        return self.launch(self.walk.walk, arrays, outs, (self.B * self.HV, count), **more)


def pieces_for(heads: int, groups: int) -> int:
    """Into how many pieces a sequence is cut that run side by side.

    What a piece does to any state takes twice the time of walking through it, so only where at
    least four of them fit on the GPU at once, and with some groups each.
    """
    pieces = min(PROGRAMS_AT_ONCE // heads, groups // GROUPS_IN_A_PIECE, MOST_PIECES)
    # None of them without a token.
    return -(-groups // -(-groups // pieces)) if pieces >= 4 else 1


def forward(options: Options, tokens: Tokens, initial_state: jax.Array):
    """Outputs [B, T, Hv, V] and the final state [B, Hv, K, V]."""
    call = Call(tokens, options)
    sums = call.sums()
    x = call.inverse(sums)
    start = initial_state
    if call.pieces > 1:
        _, ends = call.walked(x, sums, start, has_o=False, has_v=True, mode="ends")
        _, maps = call.walked(x, sums, start, has_o=False, has_v=False, mode="maps")
        start = composed(call, initial_state, maps, ends, reverse=False)
    o, after = call.walked(x, sums, start, has_o=True, has_v=True, mode="whole")
    return o, after[:, :, -1]


def composed(call: Call, first, maps, ends, *, reverse: bool) -> jax.Array:
    """States [B, Hv, pieces, K, V] that pieces begin with, or cotangents, if ``reverse``."""
    from deltaproduct_jax.ops.kernels.triton import passes, tiling

    sizes = {"R": call.meta["R"], "K": call.K, "V": call.V}
    cut = tiling.tiling_for(jnp.dtype(jnp.bfloat16), gated=False, **sizes).compose
    meta = {"K": call.K, "BK": call.K, "V": call.V, "BV": cut.columns, "ROWS": cut.keys}
    meta |= {"PIECES": call.pieces, "REVERSE": reverse, "PRECISION": "tf32x3"}
    grid = (-(-call.V // cut.columns), call.B * call.HV)
    outs = (call.states(call.pieces, call.V),)
    return passes.call("compose", (first, maps, ends), outs, grid, cut, meta=meta)[0]
