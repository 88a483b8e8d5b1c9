"""What test_convolution.py runs apart, where Triton is found: prints one JSON object.

``interpret``: errors of the kernels against the oracle, run by Triton's interpreter. ``compile``:
what is lowered for CUDA without a GPU. ``interpret all`` takes every case, and what a mesh and
`jax.vmap` make of a kernel; else those in `QUICK`.
"""

import dataclasses
import functools
import itertools
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import triton_interpreter
from flax import nnx
from ops.kernels import convolution_cases, oracle_convolution, row_cases, short_row_cases
from ops.kernels.convolution_cases import (
    MESHES,
    Case,
    layer,
    made,
    mapped,
    meshed,
    over_explicit_axes,
    relative,
    silu,
)

from deltaproduct_jax.compilers.gpu import kernel_resources
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.ops.convolution import dispatch, selection
from deltaproduct_jax.ops.convolution.plain import Form, identity
from deltaproduct_jax.ops.kernels import grids
from deltaproduct_jax.ops.kernels.triton import convolution_passes, passes, row_passes, tiling
from deltaproduct_jax.ops.varying import mark_varying_as
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout, make_mesh

TRITON = selection.by_name("triton")


CASES = {
    "SiLU and unit length, packed": Case(Form(silu, 8), packed=True, rows=1, T=6),
    "SiLU, three taps": Case(Form(silu), dtype="bfloat16", W=3, T=5, C=20),
    "unit length of 6, two taps": Case(Form(identity, 6), dtype="float16", W=2, T=5, C=18),
    "SiLU and unit length": Case(Form(silu, 8), packed=True, rows=1),
    "SiLU and unit length, bfloat16": Case(Form(silu, 8), dtype="bfloat16", packed=True),
    "SiLU and unit length, float16": Case(Form(silu, 8), dtype="float16", packed=True),
    "SiLU, packed": Case(Form(silu), packed=True, C=12, W=3),
    "sum alone, odd number of channels": Case(Form(identity), C=7, packed=True),
    "fewer tokens than taps": Case(Form(silu, 8), T=2, packed=True),
    "one token": Case(Form(silu, 8), T=1),
    "whole pieces": Case(Form(silu, 8), T=8),
}
QUICK = tuple(CASES)[:3]
# Grids as they are, and all in a line.
MOST, IN_A_LINE = grids.MOST, (grids.MOST[0], 0, 0)
# Without taps.
ACTIVATED = {
    "SiLU and unit length alone": Case(Form(silu, 8)),
    "unit length alone, odd": Case(Form(identity, 6), dtype="float16", C=18),
    "SiLU and unit length alone, bfloat16": Case(Form(silu, 24), dtype="bfloat16", T=90),
}


def cut_short(rows=None):
    """Pieces of 4 tokens, and of ``rows`` groups."""

    def short(real, *args, **options):
        cut = real(*args, **options)
        return dataclasses.replace(cut, piece=4, rows=rows or cut.rows)

    kept = {"power_of_two": staticmethod(tiling.power_of_two)}
    for name in ("convolution_for", "parts_for"):
        kept[name] = staticmethod(functools.partial(short, getattr(tiling, name)))
    convolution_passes.tiling = type("Cut", (), kept)


def both(form, u, before, taps, run, past, dy):
    """Outputs and cotangents of the kernels."""
    y = convolution_passes.forward(u, before, taps[None], run, past, form=form)
    grads = convolution_passes.backward(u, before, taps[None], run, past, dy, form=form)
    return y, *grads[:2], grads[2][0]


def errors(case):
    cut_short(case.rows)
    return convolution_cases.errors(case, both)


def activated(case):
    u, *_, dy = case.arrays()
    results = (
        convolution_passes.activated(u, form=case.form),
        convolution_passes.activated_back(u, dy, form=case.form),
    )
    options = {"silu": case.form.activation is silu, "width": case.form.unit_width}
    wanted = oracle_convolution.activated(u, dy, **options)
    named = zip(("y", "du"), results, wanted, strict=True)
    return {name: relative(x, reference) for name, x, reference in named}


# Widths of q, k and v, and behind them what is not convolved.
WIDTHS, REST = (8, 8, 16), 5
PARTS = (Form(silu, 8), Form(silu, 8), Form(silu))


def parts(packed):
    """Errors of convolutions side by side; ``rest`` is of what stands behind them."""
    case = Case(PARTS[0], C=sum(WIDTHS), T=5, packed=packed, B=1)
    u, before, taps, run, past, dy = case.arrays()
    rest = jnp.ones((*u.shape[:2], REST))
    u = jnp.concatenate([u, 2 * rest], axis=-1)
    ends = np.cumsum(WIDTHS)
    cotangents = jnp.split(dy, ends[:-1], axis=-1)
    arrays, how = (u, before, taps[None], run, past), {"parts": PARTS, "widths": WIDTHS}
    results = convolution_passes.forward_parts(*arrays, **how)
    du, *gradients = convolution_passes.backward_parts(*arrays, cotangents, rest, **how)
    found = {"rest": relative(du[..., ends[-1] :], rest)}
    for i, (form, end) in enumerate(zip(PARTS, ends, strict=True)):
        of_part = slice(end - WIDTHS[i], end)
        given = (x[..., of_part] for x in (u, before, taps))
        options = {"silu": True, "width": form.unit_width}
        y, wanted = oracle_convolution.short_convolution(
            *given, run, past, cotangents[i], **options
        )
        got = [x[..., of_part] for x in (du, *gradients)]
        pairs = zip(("y", "du", "dbefore", "dtaps"), (results[i], *got), (y, *wanted), strict=True)
        found |= {f"{name} of {i}": relative(x, reference) for name, x, reference in pairs}
    return found


def interpreted(name, arrays, *others, **options):
    """`passes.call`, whose results vary over a mesh as its arrays do."""
    results = triton_interpreter.call(name, arrays, *others, **options)
    return tuple(mark_varying_as(x, arrays[0]) for x in results)


def by_triton(choice, direction, on_others, form, *arrays):
    """In place of the choice by platform: the kernels if they may run anywhere."""
    if choice.may_run_kernel:
        return dispatch._by_triton(direction, form, *arrays)
    return on_others(form, *arrays)


def interpret(every):
    passes.call = interpreted
    names = CASES if every else QUICK
    found = {}
    for index, name in enumerate(names):
        grids.MOST = MOST if index % 2 else IN_A_LINE
        found[name] = [CASES[name].dtype, errors(CASES[name])]
    grids.MOST = MOST if every else IN_A_LINE
    some = ACTIVATED if every else dict(itertools.islice(ACTIVATED.items(), 1))
    found |= {name: [case.dtype, activated(case)] for name, case in some.items()}
    found = {"errors": found}
    for packed in (False, True) if every else (True,):
        found["errors"][f"side by side, {packed}"] = ["float32", parts(packed)]
    found["errors"]["rows"] = ["float32", row_cases.of_rows() | row_cases.of_logits()]
    if every:
        found["errors"]["short rows"] = ["float32", short_row_cases.of_short_rows()]
        dispatch._by_platform = by_triton
        dispatch._run = lambda choice, runs, others, *arrays: runs["cuda"](*arrays)
        found |= {"vmap": mapped("triton"), "layer": layer("triton")}
        found["meshes"] = {mesh: meshed(mesh, "triton") for mesh in MESHES}
        found["vmap, no taps"] = mapped_activated()
        found["layer, no convolution"] = layer("triton", use_short_conv=False)
        found["meshes, no taps"] = {mesh: meshed_activated(mesh) for mesh in MESHES[:2]}
        found["explicit"] = over_explicit_axes("triton")
    return found


def mapped_activated():
    """The same without taps."""
    case = Case(Form(silu, 8), T=6)
    u, *_, dy = case.arrays()

    def gradient(choice):
        call = lambda u: dispatch.activated(choice, case.form, u)
        return jax.vmap(lambda u: jax.vjp(call, u)[1](dy))(jnp.stack([u, 2 * u]))

    return max(map(relative, gradient(TRITON), gradient(selection.PLAIN)))


def meshed_activated(mesh):
    """The same of what stands behind the taps alone."""
    layout = Layout(make_mesh(DeviceConfig(mesh=mesh), jax.devices()), {})
    case = Case(Form(silu, 8), C=32, T=8)
    u, *_, dy = (x if x is None else x.reshape(*x.shape[:-1], 1, -1) for x in case.arrays())

    @functools.partial(jax.jit, static_argnums=2)
    def placed(u, dy, choice):
        with layout.placed():
            y, pull = jax.vjp(lambda u: dispatch.activated(choice, case.form, u), u)
            return y, *pull(dy)

    return max(map(relative, placed(u, dy, TRITON), placed(u, dy, selection.PLAIN)))


# By what is compiled: form, packed or not, dtype.
COMPILED = {
    "unit length, packed": (Form(silu, 128), True, "bfloat16"),
    "SiLU": (Form(silu), False, "bfloat16"),
    "unit length": (Form(silu, 128), False, "bfloat16"),
    "unit length of 256, float32": (Form(silu, 256), True, "float32"),
    "SiLU, float32": (Form(silu), True, "float32"),
    "unit length, float16": (Form(silu, 64), True, "float16"),
    "no activation, packed": (Form(identity), True, "bfloat16"),
}
ALONE = {"32, bfloat16": (32, "bfloat16"), "256, float32": (256, "float32")}


def compile_for_cuda():
    os.environ[passes.COMPUTE_CAPABILITY_VARIABLE] = "90"
    rows = {}
    for name in COMPILED:
        for kernel, arrays, launch, meta in launches(*COMPILED[name]):
            rows[f"{kernel}, {name}"] = kernel_resources(
                kernel_of(kernel), arrays, meta, warps=launch.warps, stages=1, compute_capability=90
            )
    for name, shape in ALONE.items():
        for kernel, arrays, launch, meta in launches_alone(*shape):
            rows[f"{kernel}, {name}"] = kernel_resources(
                kernel_of(kernel), arrays, meta, warps=launch.warps, stages=1, compute_capability=90
            )
    for name, kernel, arrays, launch, meta in launches_of_blocks():
        rows[name] = kernel_resources(
            kernel_of(kernel), arrays, meta, warps=launch.warps, stages=1, compute_capability=90
        )
    short = {
        name: kernel_resources(
            kernel_of(name),
            arrays,
            meta,
            warps=launch.warps,
            stages=launch.stages,
            compute_capability=90,
        )
        for name, arrays, launch, meta in recorded(*short_row_cases.launched())
    }
    return {"rows": rows, "short": short, "lowered": lowered(), "said": said()}


def kernel_of(name):
    from deltaproduct_jax.ops.kernels.triton import kernels

    return getattr(kernels, name)


def launches(form, packed, dtype, C=1024, W=4):
    """Both launches of a gradient, recorded."""
    u, before = (jax.ShapeDtypeStruct((8, T, C), dtype) for T in (4096, W - 1))
    taps = jax.ShapeDtypeStruct((W, C), "float32")
    ids = [jax.ShapeDtypeStruct((8, T), "int32") if packed else None for T in (4096, W - 1)]
    return recorded(functools.partial(both, form), u, before, taps, *ids, u)


def launches_alone(width, dtype):
    """The same without taps."""
    u, form = jax.ShapeDtypeStruct((8, 128, 8 * width), dtype), Form(silu, width)

    def both(u):
        return convolution_passes.activated(u, form=form), convolution_passes.activated_back(
            u, u, form=form
        )

    return recorded(both, u)


def launches_of_blocks():
    """Of a model of 1024 channels: convolutions side by side, norms and a SwiGLU's way back."""
    bfloat16 = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
    widths, tokens = (512, 1024, 1024), (8, 4096)
    how = {"parts": (Form(silu, 128), Form(silu, 128), Form(silu)), "widths": widths}

    def convolutions(u, before, taps, rest, *cotangents):
        arrays = u, before, taps, None, None
        y = convolution_passes.forward_parts(*arrays, **how)
        return y, convolution_passes.backward_parts(*arrays, cotangents, rest, **how)

    def of_rows(x, mean_square, scale, hidden, dh):
        reached, how = mean_square > 0, {"eps": 1e-6}
        y = row_passes.norm_forward(x, scale, more=x, reached=reached, looks=True, **how)
        dx = row_passes.norm_back(x, mean_square, scale, x, x, reached, again=True, **how)
        halves = row_passes.swiglu(hidden), row_passes.swiglu_back(hidden, dh)
        arrays = hidden, mean_square, reached
        back = row_passes.logit_back(*arrays, *3 * (mean_square,))
        return y, dx, halves, row_passes.logit_sums(*arrays), back

    taps = jax.ShapeDtypeStruct((1, 4, sum(widths)), "float32")
    u, before = bfloat16(*tokens, sum(widths) + 8), bfloat16(8, 3, sum(widths))
    cotangents = [bfloat16(*tokens, width) for width in widths]
    found = recorded(convolutions, u, before, taps, bfloat16(*tokens, 8), *cotangents)
    wide = [jax.ShapeDtypeStruct((size,), "float32") for size in (32768, 1024)]
    shapes = bfloat16(32768, 1024), *wide, bfloat16(32768, 5632), bfloat16(32768, 2816)
    return [(f"{call[0]} of a block", *call) for call in found + recorded(of_rows, *shapes)]


def recorded(function, *shapes):
    """What a function launches: kernel, shapes of its arrays, launch and constants."""
    found, real = [], passes.call

    def record(name, arrays, outs, grid, launch, *, meta):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays, *outs)]
        found.append((name, shapes, launch, meta))
        return tuple(jnp.zeros(out.shape, out.dtype) for out in outs)

    passes.call = record
    jax.eval_shape(function, *shapes)
    passes.call = real
    return found


def lowered():
    """How many kernels the gradient of a layer holds, lowered for CUDA."""

    def count(name, **options):
        graph, params = nnx.split(made(name, **options))

        def loss(params, x, ids):
            y, _ = nnx.merge(graph, params)(x, segment_ids=ids)
            return jnp.sum(y.astype(jnp.float32))

        shapes = jax.ShapeDtypeStruct((2, 40, 16), "bfloat16"), jax.ShapeDtypeStruct((2, 40), int)
        traced = jax.jit(jax.grad(loss)).trace(params, *shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("triton_kernel_call")

    found = {"plain": count("plain"), "triton": count("triton"), "None": count(None)}
    found["None, other op"] = count(None, implementation="chunked")
    for name in (None, "plain"):
        found[f"{name}, no convolution"] = count(name, use_short_conv=False)
    return found | {remat: in_model(remat) for remat in ("products", "blocks")}


def in_model(remat):
    """How many kernels the gradient of a model of one block holds."""
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 16, "num_layers": 1}
    options = {"use_short_conv": True, "dtype": "bfloat16", "remat": remat}
    model = SequenceModel(ModelConfig(vocab_size=8, **sizes, **options), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    loss = lambda params, ids: jnp.sum(nnx.merge(graph, params)(ids).astype(jnp.float32))
    traced = jax.jit(jax.grad(loss)).trace(params, jax.ShapeDtypeStruct((2, 40), int))
    return traced.lower(lowering_platforms=("cuda",)).as_text().count("triton_kernel_call")


def said():
    """What a user reads who names the kernels where they cannot run, or differentiates twice."""
    case = Case(Form(silu, 8))
    u, before, taps, run, past, _ = case.arrays()
    call = lambda u: dispatch.short_convolution(TRITON, case.form, u, before, taps, run, past)
    twice = jax.grad(lambda u: jnp.sum(jax.grad(lambda u: jnp.sum(call(u) ** 2))(u)))

    def text(function):
        try:
            function()
        except Exception as error:  # whatever it is, the user reads it
            return str(error)
        return "nothing"

    x = jnp.zeros((1, 3, 16), jnp.bfloat16)
    return {
        "on a CPU": text(lambda: made("triton")(x)),
        "taps": text(lambda: made("triton", conv_size=5)(x)),
        "twice": text(lambda: jax.jit(twice).trace(u).lower(lowering_platforms=("cuda",))),
    }


if __name__ == "__main__":
    mode, *every = sys.argv[1:]
    found = interpret(bool(every)) if mode == "interpret" else compile_for_cuda()
    print(json.dumps(found))
