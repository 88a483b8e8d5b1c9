"""Gluon kernels in a JAX program: compiled by Triton, launched by jaxlib's own call for it.

jax-triton 0.4.1 launches as many warps as a kernel asks for, not as many as the compiled program
has, which are more where warps are specialised. So this is a path of its own.
"""

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import mlir

from deltaproduct_jax.ops.varying import mark_varying_as

TARGET = "triton_kernel_call_ffi"
COMPUTE_CAPABILITY = 90
DTYPES = {
    "bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "float64": "*fp64",
    "int8": "*i8", "int32": "*i32", "bool": "*i1",
}  # fmt: skip

call_p = core.Primitive("delta_product_gluon")
call_p.multiple_results = True


def launch(
    kernel: Any,
    arrays: Sequence[jax.Array],
    outs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    *,
    warps: int,
    **constants: Any,
) -> list[jax.Array]:
    """Runs a Gluon kernel of pointers to ``arrays``, then ``outs``, then constants.

    Args:
        kernel: the function under `gluon.jit`.
        arrays: what it reads.
        outs: what it writes.
        grid: of programs.
        warps: of the default partition.
        **constants: its `constexpr` arguments.
    """
    results = call_p.bind(
        *arrays,
        kernel=kernel,
        outs=tuple((x.shape, x.dtype) for x in outs),
        grid=(*grid, 1, 1)[:3],
        warps=warps,
        constants=tuple(constants.items()),
    )
    return [mark_varying_as(x, arrays[0]) for x in results]


@functools.cache
def compiled(kernel: Any, dtypes: tuple[str, ...], warps: int, constants: tuple) -> Any:
    """The compiled kernel: its PTX, shared memory, number of warps; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names[: len(dtypes)]
    values = dict(constants)
    signature = {name: DTYPES[dtype] for name, dtype in zip(names, dtypes, strict=True)}
    source = GluonASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(values, "constexpr"),
        constexprs=values,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(names))},
    )
    target = GPUTarget("cuda", COMPUTE_CAPABILITY, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


@call_p.def_impl
def _run(*arrays: jax.Array, **parameters: Any) -> list[jax.Array]:
    return jax.jit(functools.partial(call_p.bind, **parameters))(*arrays)


@call_p.def_abstract_eval
def _shapes(*_: Any, outs: tuple, **__: Any) -> list[jax.core.ShapedArray]:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in outs]


def _lowering(ctx: Any, *operands: Any, kernel, outs, grid, warps, constants) -> Any:
    from jax._src.lib import gpu_triton

    dtypes = tuple(str(x.dtype) for x in (*ctx.avals_in, *ctx.avals_out))
    program = compiled(kernel, dtypes, warps, constants)
    metadata = program.metadata
    scratch: tuple = ()
    if metadata.global_scratch_size:
        scratch = metadata.global_scratch_size, metadata.global_scratch_align
    triton_kernel = gpu_triton.TritonKernel(
        metadata.name,
        metadata.num_warps,  # of the compiled program, all partitions counted
        1,
        metadata.shared,
        program.asm["ptx"],
        "",
        COMPUTE_CAPABILITY,
        *scratch,
    )
    parameters = [gpu_triton.create_array_parameter(0, 16) for _ in dtypes]
    call = gpu_triton.TritonKernelCall(triton_kernel, *grid, parameters)
    opaque = zlib.compress(call.to_proto(f"delta_product_{kernel.__name__}", b""))
    rule = jax.ffi.ffi_lowering(TARGET, api_version=4)
    return rule(ctx, *operands, opaque=opaque)


mlir.register_lowering(call_p, _lowering, platform="cuda")
