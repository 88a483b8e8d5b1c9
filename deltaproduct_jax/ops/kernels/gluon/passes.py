"""What the Gluon kernels take, and how a pass is made of their launches."""

import functools
import importlib.metadata
import inspect
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels import Options, grids
from deltaproduct_jax.ops.kernels.gluon import cut, gates, launch
from deltaproduct_jax.ops.kernels.gluon.gates import GROUP
from deltaproduct_jax.ops.kernels.gluon.launch import Tile
from deltaproduct_jax.ops.kernels.triton import passes as triton
from deltaproduct_jax.ops.kernels.triton.mend import mended
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.varying import mark_varying_as

WIDTHS = (64, 128)
# Of `compose`: columns of a state a program, warps, and stages where all pieces have maps.
COMPOSED_COLUMNS = 16
COMPOSED_WARPS = 8
COMPOSED_STAGES = 2
STAGES = 3
# Where states and errors are kept, room for them is taken from one stage; backward as well.
STAGES_OF_GRADIENTS = 2
# So that four programs of `inverse` share a multiprocessor, each of which mostly waits.
INVERSE_REGISTERS = 128
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
        and B * Hv > 0
    )


def takes_gradients(tokens: Tokens, options: Options, capability: int) -> bool:
    """Whether they run gradients of these: there must be a slot for every two states."""
    if not takes(tokens, options, capability):
        return False
    T, R = tokens.k.shape[1:3]
    return 2 * (options.slots or options.spans) * GROUP >= T * R


class Call:
    """Sizes of one call, and its launches."""

    def __init__(self, tokens: Tokens, options: Options, *, keeps: bool = True) -> None:
        """Reads the sizes; ``keeps`` what a gradient needs, or is that."""
        from deltaproduct_jax.ops.kernels.gluon import prepare, walk, walk_back

        self.tokens = tokens
        B, T, R, H, K = tokens.k.shape
        HV, V = tokens.v.shape[-2:]
        self.NG = -(-T // GROUP)
        self.prepare, self.walk, self.walk_back = prepare, walk, walk_back
        self.slots = options.slots or options.spans
        self.is_gated = tokens.g is not None or tokens.resets is not None
        self.keeps = keeps
        how = {"R": R, "gated": self.is_gated, "keeps": keeps}
        self.pieces = cut.pieces_for(B * HV, self.NG, **how)
        self.forgets = self.pieces > 1 and self.is_gated
        self.gates = {"HAS_G": tokens.g is not None, "HAS_RESETS": tokens.resets is not None}
        self.meta = {
            "SCALE": options.scale,
            "B": B,
            "T": T,
            "R": R,
            "H": H,
            "HV": HV,
            "K": K,
            "V": V,
        }
        self.meta |= {"NG": self.NG, **self.gates}
        self.B, self.HV, self.K, self.V = B, HV, K, V

        states, of_x = self.slots * B * HV * 2, (B * HV * self.NG * R * 2, 96, 32)
        tokens, updates = Tile((B, T, H * K), GROUP, K), Tile((B, T * R, H * K), GROUP, K)
        self.tiles = {
            "q": tokens,
            "k": updates,
            "v": Tile((B, T * R, HV * V), GROUP, V),
            "dv": Tile((B, T * R, HV * V), GROUP, 64),
            # Both terms of a quarter, one term, and both of the two quarters that lie together.
            "x_out": Tile(of_x, 32, 32, depth=2),
            "x_first": Tile(of_x, 32, 32, depth=2),
            "x_term": Tile(of_x, 32, 32),
            "x_rest": Tile(of_x, 64, 32, depth=2),
            "o": Tile((B, T, HV * V), GROUP, 64),
            "do": Tile((B, T, HV * V), GROUP, V),
            "states": Tile((max(states, 1), V, K), GROUP, K, "bfloat16"),
            "dq": Tile((B, T, HV * K), GROUP, K),
            "dk": Tile((B, T * R, HV * K), GROUP, K),
        }
        self.tiles |= {"e": self.tiles["v"], "errors": self.tiles["dv"]}

    def launch(self, kernel, arrays, outs, grid, *, warps=4, registers=None, **more):
        """Launches a kernel with those of ``meta`` and ``more`` that it takes."""
        names = kernel.arg_names
        grid, in_line = grids.fitted(kernel.__name__, grid, names)
        meta = {name: x for name, x in (self.meta | in_line | more).items() if name in names}
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

    def of_inverse(self) -> jax.ShapeDtypeStruct:
        """X of every block in two terms."""
        blocks = self.NG * self.meta["R"]
        return jax.ShapeDtypeStruct((self.B, self.HV, blocks * 2, 96, 32), jnp.bfloat16)

    def inverse(self, sums: jax.Array) -> jax.Array:
        """X of every block in two terms, [B, Hv, 2 blocks, 64, 64].

        And by how much groups make a state longer or shorter, at most: logarithms [B, Hv, groups],
        where that is asked for.
        """
        blocks = self.NG * self.meta["R"]
        grid = (-(-blocks // 2), self.B * self.HV)
        arrays, outs = (self.tokens.k, self.tokens.beta, sums), [self.of_inverse(), PLACEHOLDER]
        if self.forgets:
            outs[1] = jax.ShapeDtypeStruct((self.B, self.HV, 2 * blocks), jnp.float32)
        how = {"registers": INVERSE_REGISTERS, "HAS_GROWTH": self.forgets}
        x, growth = self.launch(self.prepare.inverse, arrays, outs, grid, **how)
        if not self.forgets:
            return x, growth
        growth = jnp.sum(growth.reshape(self.B, self.HV, self.NG, -1), axis=-1)
        return x, growth + jnp.where(sums[:, :, :, 2, -1] > 0, -jnp.inf, sums[:, :, :, 0, -1])

    def needs(self, growth: jax.Array) -> jax.Array:
        """How many groups of a piece matter, [B, Hv, pieces, 3], where some may not."""
        return gates.needed(growth, self.pieces) if self.forgets else growth

    def states(self, pieces: int, V: int) -> jax.ShapeDtypeStruct:
        """A state a piece."""
        return jax.ShapeDtypeStruct((self.B, self.HV, pieces, self.K, V), jnp.float32)

    def kept_states(self) -> jax.ShapeDtypeStruct:
        """Slots of a state of float32, each of which holds two of bfloat16."""
        H = self.meta["H"]
        shape = (self.slots, self.B, H, self.HV // H, self.K, self.V)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def of_pieces(self, pieces: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What each of ``pieces`` does to any state, but for both ends; and growth by groups."""
        shapes = {}
        if pieces > 2:
            shapes["maps"] = (self.B, self.HV, pieces - 2, self.K, self.K)
        if pieces > 1 and self.is_gated:
            shapes["growth"] = (self.B, self.HV, self.NG)
        return {name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in shapes.items()}

    def walked(
        self, x, sums, start, needs, *, has_o: bool, has_v: bool, mode: str, keeps: bool = False
    ):
        """Outputs, the states after pieces, kept states, errors, and what tells of bad queries."""
        q, k, v, beta = self.tokens[:4]
        first, count, pieces = {
            "whole": (0, self.pieces, self.pieces),
            "ends": (0, self.pieces - 1, self.pieces),
            "maps": (1, self.pieces - 2, self.pieces - 2),
        }[mode]
        V = self.V if has_v else self.K
        shape = (self.B, self.meta["T"], self.HV, V) if has_o else PLACEHOLDER.shape
        o = jax.ShapeDtypeStruct(shape, v.dtype)
        errors = jax.ShapeDtypeStruct(v.shape if keeps else PLACEHOLDER.shape, v.dtype)
        more = {
            "STEPS": -(-self.NG // self.pieces),
            **{"FIRST": first, "PIECES": pieces, "V": V},
            **{"S": STAGES_OF_GRADIENTS if keeps else STAGES},
            **{"HAS_O": has_o, "HAS_V": has_v, "HAS_KEPT": keeps, "START": mode},
            **{"FORGETS": self.forgets and mode != "whole", "SUMMARY": int(mode == "maps")},
        }
        arrays = (q, k, v, x, x, beta, sums, start, needs)
        outs = [o, self.states(pieces, V), self.kept_states() if keeps else PLACEHOLDER, errors]
        told = (self.B, self.HV, pieces, 4) if has_o else PLACEHOLDER.shape
        outs.append(jax.ShapeDtypeStruct(told, jnp.float32))
        return self.launch(self.walk.walk, arrays, outs, (self.B * self.HV, count), **more)

    def walked_back(self, x, sums, start, needs, do, e, states, *, mode: str):
        """Cotangents of q, k, v, beta and g's terms, and those of states before pieces."""
        q, k, v, beta = self.tokens[:4]
        T, R = self.meta["T"], self.meta["R"]
        is_whole, gated = mode == "whole", self.gates["HAS_G"]
        of_keys = (self.B, T, self.HV, self.K), (self.B, T, R, self.HV, self.K)
        of_blocks = (self.B, self.HV, self.NG, R)
        of_gates = (*of_blocks, 4, GROUP), (*of_blocks[:3], R + 1, self.V // 64)
        of_gates = of_gates if gated else 2 * (PLACEHOLDER.shape,)
        shapes = [*of_keys, v.shape, beta.shape, *of_gates]
        dtypes = [q.dtype, k.dtype, v.dtype, beta.dtype, jnp.float32, jnp.float32]
        if not is_whole:
            shapes = 6 * [PLACEHOLDER.shape]
        outs = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]
        first = 0 if is_whole else 1
        more = {
            "STEPS": -(-self.NG // self.pieces),
            **{"FIRST": first, "PIECES": self.pieces, "S": STAGES_OF_GRADIENTS},
            **{"HAS_GRADIENTS": is_whole, "START": mode},
            "FORGETS": self.forgets and not is_whole,
        }
        arrays = (q, k, x, do, e, states, x, beta, sums, start, needs)
        outs.append(self.states(self.pieces, self.V))
        grid = (self.B * self.HV, self.pieces - first)
        return self.launch(self.walk_back.walk_back, arrays, outs, grid, **more)


class Fixed(NamedTuple):
    """Of one call, whatever axes are mapped over it: ``pieces`` are those of the call as written.

    More sequences are cut into fewer pieces, or none, and then maps are found again.
    """

    options: Options
    pieces: int


def fixed(tokens: Tokens, options: Options) -> Fixed:
    """What does not change under `jax.vmap`."""
    return Fixed(options, Call(tokens, options).pieces)


def forward(fixed: Fixed, tokens: Tokens, initial_state: jax.Array):
    """Outputs [B, T, Hv, V] and the final state [B, Hv, K, V]."""
    return _forward(fixed.options, Call(tokens, fixed.options, keeps=False), initial_state)[:2]


def _forward(options: Options, call: Call, initial_state: jax.Array):
    """Outputs, the final state, and X, kept states, errors and maps, if there are any."""
    sums = call.sums()
    x, growth = call.inverse(sums)
    start, maps, needs = initial_state, None, growth
    if call.pieces > 1:
        needs = call.needs(growth)
        ends = call.walked(x, sums, start, needs, has_o=False, has_v=True, mode="ends")[1]
        if call.pieces > 2:
            maps = call.walked(x, sums, start, needs, has_o=False, has_v=False, mode="maps")[1]
        start = composed(call, initial_state, maps, ends, needs, reverse=False)
    o, after, states, errors, told = call.walked(
        x, sums, start, needs, has_o=True, has_v=True, mode="whole", keeps=call.keeps
    )
    more = {"maps": maps, "growth": growth}
    arrays = call.tokens, initial_state, told, o, after
    o, final_state = mended(triton.call, *arrays, options, block=GROUP)
    return o, final_state, x, states, errors, more


def kept_more(tokens: Tokens, options: Options) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a gradient keeps beside states: X, errors, and maps of pieces."""
    call = Call(tokens, options)
    errors = jax.ShapeDtypeStruct(tokens.v.shape, tokens.v.dtype)
    return call.of_inverse(), errors, *call.of_pieces(call.pieces).values()


def forward_kept(fixed: Fixed, tokens: Tokens, initial_state: jax.Array):
    """Outputs, the final state, and what `backward` needs."""
    call = Call(tokens, fixed.options)
    o, final_state, x, states, errors, more = _forward(fixed.options, call, initial_state)
    empty = call.of_pieces(fixed.pieces)
    if fixed.pieces != call.pieces:
        more = {name: jnp.zeros(x.shape, x.dtype) for name, x in empty.items()}
    return o, final_state, (states, x, errors, *(more[name] for name in empty))


def backward(fixed: Fixed, tokens: Tokens, kept, do, dfinal_state):
    """Cotangents of the tokens, dq and dk by value head, and of states before pieces."""
    call = Call(tokens, fixed.options)
    states, x, errors, *more = kept
    more = dict(zip(call.of_pieces(fixed.pieces), more, strict=True))
    sums, start = call.sums(), dfinal_state
    needs, arrays = jnp.zeros(PLACEHOLDER.shape, PLACEHOLDER.dtype), (do, errors, states)
    if call.pieces > 1:
        if call.forgets:
            needs = call.needs(more["growth"])
        maps = more.get("maps")
        if fixed.pieces != call.pieces and call.pieces > 2:  # whatever they begin with
            maps = call.walked(x, sums, start, needs, has_o=False, has_v=False, mode="maps")[1]
        *_, ends = call.walked_back(x, sums, start, needs, *arrays, mode="ends")
        start = composed(call, dfinal_state, maps, ends, needs, reverse=True)
    dq, dk, dv, dbeta, *terms, before = call.walked_back(
        x, sums, start, needs, *arrays, mode="whole"
    )
    dg = None if tokens.g is None else gate_cotangents(call, *terms, sums)
    return Tokens(dq, dk, dv, dbeta, dg, None), before


def gate_cotangents(call: Call, terms, wholes, sums) -> jax.Array:
    """The cotangent of g [B, T, Hv], from what `walk_back` writes by block."""
    from deltaproduct_jax.ops.kernels.gluon import spans

    meta = {name: call.meta[name] for name in ("T", "R", "HV", "NG")}
    meta |= {"RP": 1 << (meta["R"] - 1).bit_length(), "NC": call.V // 64, "MILD": gates.MILD}
    g = call.tokens.g
    out = jax.ShapeDtypeStruct(g.shape, g.dtype)
    grid, how = (call.NG, call.B * call.HV), {"num_warps": 1, "num_stages": 1}
    return launch_by_triton(spans.gate_cotangents, (terms, wholes, sums), out, grid, **how, **meta)


def composed(call: Call, first, maps, ends, needs, *, reverse: bool) -> jax.Array:
    """States [B, Hv, pieces, K, V] that pieces begin with, or cotangents, if ``reverse``."""
    from deltaproduct_jax.ops.kernels.gluon import pieces

    meta = {"K": call.K, "V": call.V, "BV": COMPOSED_COLUMNS, "PIECES": call.pieces}
    meta |= {"REVERSE": reverse, "FORGETS": call.forgets}
    out = call.states(call.pieces, call.V)
    if call.pieces == 2:  # the first has its end, the last needs no map
        maps = jnp.zeros(PLACEHOLDER.shape, PLACEHOLDER.dtype)
    grid = (call.V // COMPOSED_COLUMNS, call.B * call.HV)
    how = {"num_warps": COMPOSED_WARPS, "num_stages": COMPOSED_STAGES}
    return launch_by_triton(pieces.compose, (first, maps, ends, needs), out, grid, **how, **meta)


def launch_by_triton(kernel, arrays, out, grid, **options) -> jax.Array:
    """Launches a kernel of Triton's that writes one array."""
    import jax_triton

    named = inspect.signature(jax_triton.triton_call).parameters
    grid, in_line = grids.fitted(kernel.__name__, grid, kernel.arg_names)
    results = jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        grid=grid,
        name=f"delta_product_{kernel.__name__}",
        compute_capability=launch.COMPUTE_CAPABILITY,
        **{"out_type" if "out_type" in named else "out_shape": (out,)},
        **in_line,
        **options,
    )
    return mark_varying_as(results[0], arrays[0])
