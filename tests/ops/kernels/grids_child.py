"""What test_grids.py runs apart, where the newer Triton is found: prints one JSON object.

Of every kernel, launched on arrays of more than 2^31 numbers and with grids longer than CUDA takes
along a second axis: its grid, and what numbers of 32 bits do not hold. Nothing is allocated: shapes
are all that a launch needs. ``wrapped`` makes offsets of 32 bits of those of 64 first, in the
source of every kernel; ``all`` takes every case.
"""

import functools
import json
import os
import sys
import types

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from ops.kernels import short_row_cases
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from deltaproduct_jax.compilers.index_ranges import first_form, overflows
from deltaproduct_jax.ops.convolution.plain import Form
from deltaproduct_jax.ops.kernels import Options, grids
from deltaproduct_jax.ops.kernels.gluon import launch
from deltaproduct_jax.ops.kernels.gluon import passes as gluon
from deltaproduct_jax.ops.kernels.triton import convolution_passes, narrow, passes, row_passes
from deltaproduct_jax.ops.layout import Tokens

WRAPS = ".to(tl.int64)", ".to(gl.int64)"
HOPPER = 90


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def wide(*shape):
    return array(*shape, dtype="float32")


def op(module, B, T, R, H, K, *, gated=True, packed=False, raw=False, dtype="bfloat16"):
    """Both passes of a gradient."""
    q, k, beta = array(B, T, H, K, dtype=dtype), array(B, T, R, H, K, dtype=dtype), wide(B, T, R, H)
    resets = array(B, T, dtype="bool") if packed else None
    tokens = Tokens(q, k, k, beta, wide(B, T, H) if gated else None, resets)
    slots, state = -(-T * R // 128), wide(B, H, K, K)
    options = Options(K**-0.5, None, slots, interpret=False, slots=slots, more=True, raw=raw)
    if module is passes:
        options = options._replace(more=bool(passes.kept_more(tokens, options)))

    def both(tokens, state, do):
        if module is gluon:
            fixed = gluon.fixed(tokens, options)
            *_, kept = gluon.forward_kept(fixed, tokens, state)
            gluon.forward(fixed, tokens, state)
            return gluon.backward(fixed, tokens, kept, do, state)
        kept = module.forward(tokens, state, options, keep_states=True)[2]
        return module.backward(tokens, kept, do, state, options)

    return both, tokens, state, q


def step(B, R, H, K):
    arrays = wide(B, H, K, K), array(B, H, K), *2 * (array(B, R, H, K),), wide(B, R, H), wide(B, H)
    return lambda *arrays: passes.step(*arrays, scale=1.0), *arrays


def convolutions(B, T, C, *, packed=True):
    form, W = Form(jax.nn.silu, 128), 4

    def both(u, before, taps, run, past):
        arrays = u, before, taps, run, past
        y = convolution_passes.forward(*arrays, form=form)
        dy = convolution_passes.backward(*arrays, u, form=form)
        alone = convolution_passes.activated(u, form=form)
        return y, dy, alone, convolution_passes.activated_back(u, u, form=form)

    ids = [array(B, n, dtype="int32") if packed else None for n in (T, W - 1)]
    return both, array(B, T, C), array(B, W - 1, C), wide(1, W, C), *ids


def side_by_side(B, T, *widths):
    unit, C, rest = Form(jax.nn.silu, 128), sum(widths), 8
    how = {"parts": (unit, unit, Form(jax.nn.silu)), "widths": widths}

    def both(u, before, taps, rest, *cotangents):
        arrays = u, before, taps, None, None
        y = convolution_passes.forward_parts(*arrays, **how)
        return y, convolution_passes.backward_parts(*arrays, cotangents, rest, **how)

    u, before, taps = array(B, T, C + rest), array(B, 3, C), wide(1, 4, C)
    return both, u, before, taps, array(B, T, rest), *(array(B, T, width) for width in widths)


def rows(N, D, hidden):
    def of_rows(x, squares, scale, hidden, dh):
        reached, how = squares > 0, {"eps": 1e-6}
        y = row_passes.norm_forward(x, scale, more=x, reached=reached, looks=True, **how)
        dx = row_passes.norm_back(x, squares, scale, x, x, reached, again=True, **how)
        return y, dx, row_passes.swiglu(hidden), row_passes.swiglu_back(hidden, dh)

    return of_rows, array(N, D), wide(N), wide(D), array(N, 2 * hidden), array(N, hidden)


def logits(N, V):
    def both(x, sums):
        arrays = x, sums, sums > 0
        return row_passes.logit_sums(*arrays), row_passes.logit_back(*arrays, *3 * (sums,))

    return both, array(N, V), wide(N)


CASES = {
    "narrow": lambda: op(narrow, 65536, 1000, 4, 8, 32, packed=True, raw=True),
    "wide": lambda: op(passes, 64, 65536, 4, 8, 256, packed=True),
    "gluon": lambda: op(gluon, 1024, 2**20, 2, 4, 128, packed=True),
    "gluon, many": lambda: op(gluon, 140000, 64, 1, 1, 128),
    "step": lambda: step(100000, 4, 8, 128),
    "convolutions": lambda: convolutions(8, 2**23, 2048),
    "side by side": lambda: side_by_side(16, 2**23, 1024, 2048, 2048),
    "rows": lambda: rows(2**21, 4096, 11008),
    "logits": lambda: logits(8 * 32768, 32000),
}
QUICK = tuple(CASES)
CASES |= {
    "wide, ungated": lambda: op(passes, 64, 65536, 4, 8, 256, gated=False),
    "wide, float32": lambda: op(passes, 64, 65536, 4, 8, 128, dtype="float32"),
    "wide, long": lambda: op(passes, 1, 2**22, 8, 1, 64, dtype="float16"),
    "wide, many": lambda: op(passes, 70000, 4096, 2, 1, 64, dtype="float16"),
    "wide, many heads": lambda: op(passes, 1, 64, 1, 2**23, 32),
    "narrow, many heads": lambda: op(narrow, 1, 64, 1, 2**22 - 1, 32),
    "narrow, float32": lambda: op(narrow, 65536, 1000, 2, 8, 16, gated=False, dtype="float32"),
    "gluon, ungated": lambda: op(gluon, 1024, 2**20, 2, 4, 64, gated=False),
    "gluon, in pieces": lambda: op(gluon, 1, 2**23, 4, 1, 128),
    "convolutions, many": lambda: convolutions(70000, 4096, 2048, packed=False),
    "rows, short": lambda: rows(2**28, 64, 88),
    "short rows": lambda: short_row_cases.launched(2**26),
}


def recorded(function, *shapes) -> list[tuple]:
    """Launches: kernel, dtypes of arrays, constants, options, grid, tiles."""
    from deltaproduct_jax.ops.kernels.triton import kernels

    found = []

    def empty(outs):
        return tuple(jnp.zeros(out.shape, out.dtype) for out in outs)

    def call(name, arrays, outs, grid, how, *, meta, aliases=None):
        kernel = getattr(kernels, name)
        grid, line = grids.fitted(name, grid, kernel.arg_names)
        meta = {key: x for key, x in {**meta, **line}.items() if key in kernel.arg_names}
        options = {"num_warps": how.warps, "num_stages": how.stages}
        found.append((kernel, (*arrays, *outs), meta, options, grid, {}))
        return empty(outs)

    def by_gluon(kernel, arrays, outs, grid, *, warps, tiles, registers=None, **meta):
        found.append((kernel, (*arrays, *outs), meta, {"num_warps": warps}, grid, tiles))
        return list(empty(outs))

    def by_triton(kernel, arrays, out, grid, **meta):
        grid, line = grids.fitted(kernel.__name__, grid, kernel.arg_names)
        options = {name: meta.pop(name) for name in ("num_warps", "num_stages")}
        found.append((kernel, (*arrays, out), {**meta, **line}, options, grid, {}))
        return empty([out])[0]

    passes.call, launch.launch, gluon.launch_by_triton = call, by_gluon, by_triton
    jax.eval_shape(function, *shapes)
    return found


def source(kernel, arrays, meta, tiles):
    """Of a launch, as `triton.compile` takes it."""
    names = [name for name in kernel.arg_names if name not in meta]
    dtypes = [launch.DTYPES[str(x.dtype)] for x in arrays]
    signature = dict(zip(names, ("*" + dtype for dtype in dtypes), strict=True))
    signature |= dict.fromkeys(meta, "constexpr")
    if not kernel.is_gluon():
        return ASTSource(kernel, signature, meta)
    signature |= {name: launch.described(tile, signature[name][1:]) for name, tile in tiles.items()}
    return GluonASTSource(kernel, signature, meta)


def wrap() -> None:
    """Takes the 64 bits from all offsets."""
    from triton import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("deltaproduct_jax.ops.kernels."):
            for x in vars(module).values():
                if isinstance(x, JITFunction):
                    text = x.src
                    for wide in WRAPS:
                        text = text.replace(wide, "")
                    x._unsafe_update_src(text)


def found_of(case: str, *, wrapped: bool) -> list[dict]:
    found, seen = [], []
    for kernel, arrays, meta, options, grid, tiles in recorded(*CASES[case]()):
        if (kernel, meta) in seen:
            continue
        seen.append((kernel, meta))
        if wrapped:
            wrap()
        text = first_form(source(kernel, arrays, meta, tiles), options, HOPPER)
        lines = overflows(text, grid)
        in_line = meta.get("GX", 0) > 0
        found.append({"name": kernel.__name__, "grid": grid, "in_line": in_line, "lines": lines})
    return found


def handed_on() -> list[dict]:
    """What jax-triton is given by both functions that launch through it."""
    found = []

    def triton_call(*arrays, kernel, grid, out_type, **named):
        found.append({"grid": grid, **{key: named[key] for key in ("GX", "GY")}})
        return tuple(jnp.zeros(out.shape, out.dtype) for out in out_type)

    sys.modules["jax_triton"] = types.ModuleType("jax_triton")
    sys.modules["jax_triton"].triton_call = triton_call
    for rows in (65535, 131072):
        sums = wide(rows)
        jax.eval_shape(row_passes.logit_back, array(rows, 4097), *5 * (sums,))
    kernel = types.SimpleNamespace(__name__="compose", arg_names=["GX", "GY"])
    for heads in (65535, 70000):
        launched = functools.partial(gluon.launch_by_triton, kernel, out=wide(1), grid=(2, heads))
        jax.eval_shape(lambda x, launched=launched: launched([x]), wide(heads))
    return found


if __name__ == "__main__":
    found = {"handed on": handed_on()}
    for name in CASES if "all" in sys.argv else QUICK:
        found[name] = found_of(name, wrapped="wrapped" in sys.argv)
    print(json.dumps(found))
