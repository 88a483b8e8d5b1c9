"""The GPU kernels: what is launched on which arrays, in pieces.

The contract of `forward` and `backward` is that of `deltaproduct_jax.ops.kernels`; `step` is one
token. The bodies are in `kernels`, which needs Triton and is imported at the first launch.
"""

import dataclasses
import inspect
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels import Options, grids
from deltaproduct_jax.ops.kernels.triton import tiling
from deltaproduct_jax.ops.kernels.triton.batching import batched
from deltaproduct_jax.ops.kernels.triton.mend import gates, mended
from deltaproduct_jax.ops.kernels.triton.terms import summed
from deltaproduct_jax.ops.kernels.triton.tiling import Launch
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.varying import mark_varying_as

# What a program is compiled for where no GPU says, e.g. ahead of time: Hopper.
COMPUTE_CAPABILITY = 90
# A100, H100 and H200, B200. Others have 100 KiB a multiprocessor, or have not been looked at.
LARGE_SHARED_MEMORY = (80, 90, 100)
COMPUTE_CAPABILITY_VARIABLE = "DELTAPRODUCT_COMPUTE_CAPABILITY"

# What `prepare` makes is kept beside states where it has at most this share of their bytes.
BESIDE_STATES = 0.6
# Of float32 products; products of bfloat16 and float16 are exact whatever it says.
PRECISIONS = {None: "tf32x3", "default": "tf32", "high": "tf32x3", "highest": "ieee"}
NARROW = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def unsupported(*, dtype, B: int, T: int, R: int, H: int, Hv: int, K: int, V: int, precision):
    """Why the kernels cannot run these, or None."""
    del B, T, H, Hv, precision
    if jnp.dtype(dtype) not in (*NARROW, jnp.dtype(jnp.float32)):
        return f"the dtype is {jnp.dtype(dtype)}; it takes bfloat16, float16 and float32"
    for name, size, most in (("R", R, 8), ("K", K, 256), ("V", V, 512)):
        if size > most:
            return f"{name} is {size}; it takes at most {most}"
    return None


def is_ready() -> bool:
    """Whether the GPU has the shared memory, over 128 KiB, that tiles for 128 x 128 states take."""
    return compute_capability() in LARGE_SHARED_MEMORY


def kept_span(span: int, **sizes) -> int:
    """Every slot of the residuals is used."""
    del sizes
    return span


def kept_more(tokens: Tokens, options: Options) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What `prepare` makes, where that is small beside the states, and maps of pieces."""
    return sum(_kept_more(tokens, options).values(), ())


def _kept_more(tokens: Tokens, options: Options) -> dict[str, tuple[jax.ShapeDtypeStruct, ...]]:
    """The same by name; what is not kept is made again."""
    c = _Call(tokens, options)
    more = {}
    states = options.spans * 4 * math.prod(c.of_pieces().shape) // c.pieces
    if sum(x.size * x.dtype.itemsize for x in c.prepared()) <= BESIDE_STATES * states:
        more["prepared"] = c.prepared()
    if c.pieces > 1:  # then they are few: a GPU runs all at once
        more["maps"] = (c.maps(c.pieces),)
    return more


class _Fixed(NamedTuple):
    """Of one call, whatever axes are mapped over it.

    Attributes:
      options: what the kernels are told.
      more: names of what is kept beside states.
      pieces: of a sequence, in the call as it is written: as many maps are kept. More sequences
        are cut into fewer pieces, or none, and then maps are made again.
    """

    options: Options
    more: tuple[str, ...]
    pieces: int


def _fixed(tokens: Tokens, options: Options) -> _Fixed:
    more = tuple(_kept_more(tokens, options)) if options.more else ()
    return _Fixed(options, more, _Call(tokens, options).pieces)


def forward(tokens: Tokens, initial_state: jax.Array, options: Options, *, keep_states: bool):
    """Outputs [B, T, Hv, V], final state [B, Hv, K, V], and what `backward` needs."""
    options = options if keep_states else options._replace(spans=0, more=False)
    run = batched(_run_forward, _fixed(tokens, options))
    o, final_state, kept = run(tokens, initial_state)
    return o, final_state, kept if keep_states else None


def backward(tokens: Tokens, kept: tuple[jax.Array, ...], do, dfinal_state, options: Options):
    """Cotangents of the tokens, dq and dk by value head, and of states before pieces."""
    return batched(_run_backward, _fixed(tokens, options))(tokens, kept, do, dfinal_state)


def step(state, q, k, v, beta, g, *, scale: float):
    """One token; shapes as in `deltaproduct_jax.ops.delta_product_step`."""
    return batched(_step, scale)(state, q, k, v, beta, g)


@dataclasses.dataclass(frozen=True)
class _Call:
    """Sizes of one call, and what launches have in common."""

    tokens: Tokens
    options: Options

    def __post_init__(self) -> None:
        """What follows from the arrays."""
        k, v = self.tokens.k, self.tokens.v
        B, T, R, H, K = k.shape
        HV, V = v.shape[-2:]
        precision = self.options.precision
        narrow = k.dtype in NARROW
        # The dtype that products are made in; with narrow inputs only the series needs float32.
        operand = k.dtype if narrow and precision in (None, "default") else jnp.dtype(jnp.float32)
        gated = self.tokens.g is not None
        tiles = tiling.tiling_for(operand, R=R, K=K, V=V, gated=gated)
        N = -(-T // tiles.chunk_size)
        pieces = tiling.pieces_for(B * HV, N, tiles.walk, V=V)
        span = -(-N // self.options.spans) if self.options.spans else 0
        which = {"HAS_G": gated, "HAS_RESETS": self.tokens.resets is not None}
        meta = {
            **{"SCALE": self.options.scale, "B": B, "T": T, "R": R, "H": H, "HV": HV, "K": K},
            **{"BK": tiles.key_columns, "V": V, "C": tiles.chunk_size, "N": N},
            **{"CP": tiles.token_rows, "M": tiles.update_rows},
            **{"STEPS": -(-N // pieces), "PIECES": pieces},
            **{"SPAN": span, "NARROW": operand in NARROW and 1 <= span <= 2},
            "TWO": operand in NARROW,
            **{**which, "DECAYS": any(which.values())},
            "PRECISION": "tf32x3" if narrow else PRECISIONS[precision],
        }
        found = {"operand": operand, "tiling": tiles, "pieces": pieces, "meta": meta}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def matrices(self, rows: int, columns: int) -> jax.ShapeDtypeStruct:
        """One matrix per chunk."""
        B, HV, N = (self.meta[name] for name in ("B", "HV", "N"))
        return jax.ShapeDtypeStruct((B, HV, N, rows, columns), self.operand)

    def of_pieces(self) -> jax.ShapeDtypeStruct:
        """A state per piece."""
        B, HV, K, V = (self.meta[name] for name in ("B", "HV", "K", "V"))
        return jax.ShapeDtypeStruct((B, HV, self.pieces, K, V), jnp.float32)

    def maps(self, pieces: int) -> jax.ShapeDtypeStruct:
        """What each of ``pieces`` does to any state, but for what it adds; of both ends nothing."""
        B, HV, K = (self.meta[name] for name in ("B", "HV", "K"))
        return jax.ShapeDtypeStruct((B, HV, pieces - 2, K, K), jnp.float32)

    def of_decays(self, parts: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Terms of the cotangent of g, by chunk and part of K, as `gradients` writes them."""
        B, HV, N, M, CP = (self.meta[name] for name in ("B", "HV", "N", "M", "CP"))
        sizes = (B, HV, N, parts)
        return tuple(
            jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*sizes, 2 * M + CP), sizes)
        )

    def prepared(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What `prepare` makes and is read again: X, scores and, if anything decays, of decays."""
        CP, M = self.meta["CP"], self.meta["M"]
        matrices = self.matrices(M, M), self.matrices(CP, M)
        chunks = matrices[0].shape[:3]
        decays = jax.ShapeDtypeStruct((*chunks, M), jnp.float32)
        sums = jax.ShapeDtypeStruct((*chunks, 3, M), jnp.float32)
        return (*matrices, decays, decays, sums) if self.meta["DECAYS"] else matrices

    def launch(self, name: str, arrays, outs, grid, **more):
        """Launches a kernel with those of ``meta`` and ``more`` that it takes."""
        launch = getattr(self.tiling, name)
        meta = {**self.meta, "BV": launch.columns, **more}
        return call(name, arrays, outs, grid, launch, meta=meta)


# X, scores, decays from the start of a chunk and to its end, sums of g.
PREPARED = 5
PLACEHOLDER = jax.ShapeDtypeStruct((1,), jnp.float32)


def _prepare(c: _Call):
    """X, scores, decays and sums of g of every chunk, and what tells of bad queries."""
    q, k, _, beta, *_ = c.tokens
    x, scores, *decays = (*c.prepared(), *3 * (PLACEHOLDER,))[:PREPARED]
    told = jax.ShapeDtypeStruct(x.shape[:3], jnp.float32)
    grid = (c.meta["N"], c.meta["B"] * c.meta["HV"])
    outs = x, scores, told, *decays
    x, scores, told, *decays = c.launch("prepare", (q, k, beta, *gates(c.tokens)), outs, grid)
    return (x, scores, *decays), told


def _walk(c: _Call, arrays, start, *outs):
    """Outputs, states after pieces, kept states and maps.

    Without ``outs`` a summary, of which only the states, ends of pieces, and the maps matter.
    """
    columns = c.tiling.walk.columns
    for_ends, for_maps = (-(-c.meta[name] // columns) for name in ("V", "K"))
    o, states = outs or (PLACEHOLDER, PLACEHOLDER)
    maps = PLACEHOLDER if outs else c.maps(c.pieces)
    grid = (for_ends + (0 if outs else for_maps), c.pieces, c.meta["B"] * c.meta["HV"])
    more = {"SUMMARY": not outs} | ({} if outs else {"SPAN": 0, "NARROW": False})
    results = o, c.of_pieces(), states, maps
    return c.launch("walk", (*arrays, start), results, grid, **more)


def _walk_back(c: _Call, arrays, start, *outs):
    """Cotangents of what is written, of states after chunks, and of states before pieces.

    Without ``outs`` a summary, of which only those before pieces matter.
    """
    w, after = outs or (PLACEHOLDER, PLACEHOLDER)
    parts = -(-c.meta["V"] // c.tiling.walk_back.columns)
    grid = (parts, c.pieces, c.meta["B"] * c.meta["HV"])
    results = w, after, c.of_pieces()
    return c.launch("walk_back", (*arrays, start), results, grid, SUMMARY=not outs)


def _composed(c: _Call, first, maps, ends, *, reverse: bool):
    """States [B, Hv, pieces, K, V] that pieces begin with, or cotangents, if ``reverse``."""
    launch = c.tiling.compose
    grid = (-(-c.meta["V"] // launch.columns), c.meta["B"] * c.meta["HV"])
    arrays, more = (first, maps, ends), {"ROWS": launch.keys, "REVERSE": reverse}
    return c.launch("compose", arrays, (c.of_pieces(),), grid, **more)[0]


def _run_forward(fixed: _Fixed, tokens: Tokens, initial_state):
    options = fixed.options
    c = _Call(tokens, options)
    B, _, _, HV, V = tokens.v.shape
    H, K = tokens.k.shape[-2:]
    o = jax.ShapeDtypeStruct((B, tokens.v.shape[1], HV, V), tokens.v.dtype)
    states = jax.ShapeDtypeStruct((max(options.spans, 1), B, H, HV // H, K, V), jnp.float32)
    if not options.spans:
        states = jax.ShapeDtypeStruct((1, B, 1, 1, 1, 1), jnp.float32)
    prepared, told = _prepare(c)
    arrays = (*tokens[:4], *prepared[:-1])
    # Where few heads leave a GPU idle, a first launch finds what each piece does to any state.
    starts, maps = initial_state, None
    if c.pieces > 1:
        _, ends, _, maps = _walk(c, arrays, initial_state)
        starts = _composed(c, initial_state, maps, ends, reverse=False)
    o, after_pieces, states, _ = _walk(c, arrays, starts, o, states)
    if options.spans:
        states = states.at[-(-c.meta["N"] // c.meta["SPAN"]) :].set(0.0)  # slots left over
    more = ()
    if "prepared" in fixed.more:
        more += tuple(prepared[: len(c.prepared())])
    if "maps" in fixed.more:
        empty = c.maps(fixed.pieces)
        more += (maps if fixed.pieces == c.pieces else jnp.zeros(empty.shape, empty.dtype),)
    block = c.meta["C"]
    o, final = mended(call, tokens, initial_state, told, o, after_pieces, options, block=block)
    return o, final, (states, *more)


def _run_backward(fixed: _Fixed, tokens: Tokens, kept, do, dfinal_state):
    c = _Call(tokens, fixed.options)
    states, *more = kept
    q, k, v, beta, g, _ = tokens
    B, _, _, HV, V = v.shape
    K, N = k.shape[-1], c.meta["N"]
    maps = more.pop() if "maps" in fixed.more else None
    prepared = more if "prepared" in fixed.more else _prepare(c)[0]
    prepared = (*prepared, *(PREPARED - len(prepared)) * (jnp.zeros(1, jnp.float32),))
    *prepared, sums = prepared
    x, _, into, out = prepared
    updates = jax.ShapeDtypeStruct(v.shape, c.operand)
    narrow = c.meta["NARROW"]
    steps = N if narrow else -(-N // c.meta["SPAN"])
    grid = (-(-V // c.tiling.errors.columns), steps, B * HV)
    outs = (updates, PLACEHOLDER if narrow else c.matrices(K, V))
    e, before = c.launch("errors", (k, v, beta, x, into, out, states), outs, grid)
    if narrow:
        before = states

    arrays = (q, k, beta, *prepared, do)
    starts = dfinal_state
    if c.pieces > 1:
        if maps is None or fixed.pieces != c.pieces:
            of_walk = (q, k, v, beta, *prepared)
            *_, maps = _walk(c, of_walk, dfinal_state)  # whatever it begins with
        *_, ends = _walk_back(c, arrays, dfinal_state)
        starts = _composed(c, dfinal_state, maps, ends, reverse=True)
    w, after, before_pieces = _walk_back(c, arrays, starts, updates, c.matrices(K, V))

    # Of a value head; the parts of K are summed below.
    keys = c.tiling.gradients.keys or c.tiling.key_columns
    parts = -(-K // keys)
    outs = (*of_value_heads(tokens), *(2 * (PLACEHOLDER,) if g is None else c.of_decays(parts)))
    arrays = (q, k, beta, into, out, sums, do, e, w, before, after)
    grid = (parts, N, B * HV)
    dq, dk, dv, dbeta, *of_decays = c.launch("gradients", arrays, outs, grid, BK=keys)
    dg = None if g is None else summed(c.meta, *of_decays, into[..., -1]).astype(g.dtype)
    return Tokens(dq, dk, dv, dbeta, dg, None), before_pieces


def of_value_heads(tokens: Tokens) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What kernels write of the cotangents of q, k, v and beta: dq and dk for every value head."""
    q, k, v, beta, *_ = tokens
    HV = v.shape[-2]
    dtype = q.dtype if HV == q.shape[-2] else jnp.float32
    return (
        *(jax.ShapeDtypeStruct((*x.shape[:-2], HV, x.shape[-1]), dtype) for x in (q, k)),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (v, beta)),
    )


def summed_over_groups(dq, dk, tokens: Tokens):
    """Of these dq and dk those of key heads, which groups of value heads share."""

    def of_key_heads(dx, x):
        *more, H, K = x.shape
        dx = dx.reshape(*more, H, -1, K).astype(jnp.float32)
        return jnp.sum(dx, axis=-2).astype(x.dtype)

    if dq.shape == tokens.q.shape:
        return dq, dk
    return of_key_heads(dq, tokens.q), of_key_heads(dk, tokens.k)


def _step(scale: float, state, q, k, v, beta, g):
    B, R, H, K = k.shape
    HV, V = v.shape[-2:]
    launch = tiling.step_for(R=R, K=K, V=V)
    meta = {"SCALE": scale, "R": R, "H": H, "HV": HV, "K": K, "V": V, "HAS_G": g is not None}
    meta |= {"BK": tiling.power_of_two(K), "BV": launch.columns}
    arrays = (q, k, v, beta, beta if g is None else g, state)
    o = jax.ShapeDtypeStruct((B, HV, V), v.dtype)
    outs = (o, jax.ShapeDtypeStruct(state.shape, state.dtype))
    grid = (-(-V // launch.columns), B * HV)
    # The state in place: a loop that carries it would copy it once per token otherwise.
    in_place = {len(arrays) - 1: len(outs) - 1}
    return call("step", arrays, outs, grid, launch, meta=meta, aliases=in_place)


def call(name: str, arrays, outs, grid, launch: Launch, *, meta: dict[str, Any], aliases=None):
    """Launches a kernel through jax-triton, 0.3 or 0.4, with those of ``meta`` that it takes.

    ``aliases`` maps an input to the output that is written in its place. A slice of an array, such
    as one layer's state in a scan, is no place of its own for XLA, which from jax 0.11 on may let a
    kernel write into the array itself (`xla_gpu_enable_dynamic_slice_fusion`): hence a barrier.
    """
    import jax_triton

    from deltaproduct_jax.ops.kernels.triton import kernels

    keywords = inspect.signature(jax_triton.triton_call).parameters
    keyword = "out_shape" if "out_shape" in keywords else "out_type"
    # 0.3 passes nothing on to the compiler.
    limits = launch.registers and "backend_options" in keywords
    limited = {"backend_options": {"maxnreg": launch.registers}} if limits else {}
    # 0.4 gives a kernel one pointer for an input and the output in its place.
    is_one_pointer = aliases and keyword == "out_type"
    kernel = getattr(kernels, name + "_in_place" * bool(is_one_pointer))
    grid, line = grids.fitted(name, grid, kernel.arg_names)
    arrays = [
        jax.lax.optimization_barrier(x) if place in (aliases or {}) else x
        for place, x in enumerate(arrays)
    ]
    results = jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        grid=grid,
        name=f"delta_product_{name}",
        num_warps=launch.warps,
        num_stages=launch.stages,
        compute_capability=compute_capability(),
        input_output_aliases=aliases or {},
        **{keyword: tuple(outs), **limited},
        **{key: value for key, value in {**meta, **line}.items() if key in kernel.arg_names},
    )
    return tuple(mark_varying_as(x, arrays[0]) for x in results)


def compute_capability() -> int:
    """Of the GPU that is here, or of the one that is named, or compiled for without any."""
    if named := os.environ.get(COMPUTE_CAPABILITY_VARIABLE):
        return int(named)
    try:
        return int(jax.devices("cuda")[0].compute_capability.replace(".", ""))
    except RuntimeError:  # there is no GPU here
        return COMPUTE_CAPABILITY
