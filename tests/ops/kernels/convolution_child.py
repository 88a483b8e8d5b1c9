"""What test_convolution.py runs apart, where Triton is found: prints one JSON object.

``interpret``: errors of the kernels against the oracle, run by Triton's interpreter. ``compile``:
what is lowered for CUDA without a GPU. ``interpret all`` takes every case, and what a mesh and
`jax.vmap` make of a kernel; else those in `QUICK`.
"""

import dataclasses
import functools
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import triton_interpreter
from flax import nnx
from ops.kernels import convolution_cases
from ops.kernels.convolution_cases import (
    MESHES,
    Case,
    layer,
    made,
    mapped,
    meshed,
    over_explicit_axes,
    silu,
)

from deltaproduct_jax.compilers.gpu import kernel_resources
from deltaproduct_jax.ops.convolution import dispatch, selection
from deltaproduct_jax.ops.convolution.plain import Form, identity
from deltaproduct_jax.ops.kernels.triton import convolution_passes, passes, tiling
from deltaproduct_jax.ops.varying import mark_varying_as

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


def cut_short(rows=None):
    """Pieces of 4 tokens, and of ``rows`` groups."""

    def short(*args, real=tiling.convolution_for, **options):
        cut = real(*args, **options)
        return dataclasses.replace(cut, piece=4, rows=rows or cut.rows)

    convolution_passes.tiling = type("Cut", (), {"convolution_for": staticmethod(short)})


def both(form, u, before, taps, run, past, dy):
    """Outputs and cotangents of the kernels."""
    y = convolution_passes.forward(u, before, taps[None], run, past, form=form)
    grads = convolution_passes.backward(u, before, taps[None], run, past, dy, form=form)
    return y, *grads[:2], grads[2][0]


def errors(case):
    cut_short(case.rows)
    return convolution_cases.errors(case, both)


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
    found = {name: [CASES[name].dtype, errors(CASES[name])] for name in names}
    found = {"errors": found}
    if every:
        dispatch._by_platform = by_triton
        found |= {"vmap": mapped("triton"), "layer": layer("triton")}
        found["meshes"] = {mesh: meshed(mesh, "triton") for mesh in MESHES}
        found["explicit"] = over_explicit_axes("triton")
    return found


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


def compile_for_cuda():
    os.environ[passes.COMPUTE_CAPABILITY_VARIABLE] = "90"
    rows = {}
    for name in COMPILED:
        for kernel, arrays, launch, meta in launches(*COMPILED[name]):
            rows[f"{kernel}, {name}"] = kernel_resources(
                kernel_of(kernel), arrays, meta, warps=launch.warps, stages=1, compute_capability=90
            )
    return {"rows": rows, "lowered": lowered(), "said": said()}


def kernel_of(name):
    from deltaproduct_jax.ops.kernels.triton import kernels

    return getattr(kernels, name)


def launches(form, packed, dtype, C=1024, W=4):
    """Both launches of a gradient, recorded."""
    recorded, real = [], passes.call

    def record(name, arrays, outs, grid, launch, *, meta):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays, *outs)]
        recorded.append((name, shapes, launch, meta))
        return tuple(jnp.zeros(out.shape, out.dtype) for out in outs)

    passes.call = record
    u, before = (jax.ShapeDtypeStruct((8, T, C), dtype) for T in (4096, W - 1))
    taps = jax.ShapeDtypeStruct((W, C), "float32")
    ids = [jax.ShapeDtypeStruct((8, T), "int32") if packed else None for T in (4096, W - 1)]
    jax.eval_shape(functools.partial(both, form), u, before, taps, *ids, u)
    passes.call = real
    return recorded


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
    selection.BY_DEFAULT = True
    found["None, by default"] = count(None)
    found["None, by default, other op"] = count(None, implementation="chunked")
    selection.BY_DEFAULT = False
    return found


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
