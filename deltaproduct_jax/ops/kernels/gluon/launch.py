"""Gluon kernels in a JAX program: compiled by Triton, launched by jaxlib's own call for it.

jax-triton 0.4.1 launches as many warps as a kernel asks for, not as many as the compiled program
has, which are more where warps are specialised. So this is a path of its own.
"""

import functools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.interpreters import mlir

from deltaproduct_jax.ops.varying import mark_varying_as

TARGET = "triton_kernel_call_ffi"
COMPUTE_CAPABILITY = 90
DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "int8": "i8",
    "int32": "i32",
}  # fmt: skip
GLUON = {"bf16": "bfloat16"}


class Tile(NamedTuple):
    """An array as the copy engine sees it: three dimensions, and rows and columns of a tile.

    Of ``depth`` matrices behind each other a tile has as much.

    With a dtype the memory is taken as if it held that one.
    """

    shape: tuple[int, int, int]
    rows: int
    columns: int
    dtype: str | None = None
    depth: int = 1


call_p = core.Primitive("delta_product_gluon")
call_p.multiple_results = True


def is_supported() -> bool:
    """Whether jaxlib, with its part for CUDA, launches kernels with descriptors of tiles."""
    try:
        from jax._src.lib import gpu_triton
    except ImportError:
        return False
    return hasattr(gpu_triton, "create_tma_descriptor_parameter")


def launch(
    kernel: Any,
    arrays: Sequence[jax.Array],
    outs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    *,
    warps: int,
    tiles: Mapping[str, Tile],
    registers: int | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Runs a Gluon kernel of ``arrays``, then ``outs``, then constants.

    Args:
        kernel: the function under `gluon.jit`.
        arrays: what it reads.
        outs: what it writes.
        grid: of programs.
        warps: of the default partition.
        tiles: those arguments that the kernel moves by TMA; it has pointers to the others. Their
            descriptors are made on the host: a program that makes its own begins microseconds
            later, and needs scratch memory, with which XLA does not record a program as a graph.
        registers: that a thread may have at most, where more programs a multiprocessor pay.
        **constants: its `constexpr` arguments.
    """
    results = call_p.bind(
        *arrays,
        kernel=kernel,
        outs=tuple((x.shape, x.dtype) for x in outs),
        grid=(*grid, 1, 1)[:3],
        warps=warps,
        tiles=tuple(tiles.items()),
        registers=registers,
        constants=tuple(constants.items()),
    )
    return [mark_varying_as(x, arrays[0]) for x in results]


@functools.cache
def compiled(
    kernel: Any,
    dtypes: tuple[str, ...],
    warps: int,
    tiles: tuple,
    constants: tuple,
) -> Any:
    """The compiled kernel: its PTX, shared memory, number of warps; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names[: len(dtypes)]
    signature = {name: "*" + DTYPES[dtype] for name, dtype in zip(names, dtypes, strict=True)}
    signature |= {name: described(tile, signature[name][1:]) for name, tile in tiles}
    values = dict(constants)
    pointers = [i for i, name in enumerate(names) if name not in dict(tiles)]
    source = GluonASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(values, "constexpr"),
        constexprs=values,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    target = GPUTarget("cuda", COMPUTE_CAPABILITY, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def described(tile: Tile, dtype: str) -> str:
    """The type of an argument that is moved by TMA, of an array of this dtype."""
    from triton.experimental.gluon import language as gl

    block = [tile.depth, tile.rows, tile.columns]
    dtype = DTYPES[tile.dtype] if tile.dtype else dtype
    layout = gl.NVMMASharedLayout.get_default_for(block, getattr(gl, GLUON[dtype]))
    return f"tensordesc<{dtype}{block},{layout!r}>"


def limited(ptx: str, registers: int | None) -> str:
    """PTX with at most so many registers a thread, of which Gluon takes no notice otherwise."""
    if registers is None:
        return ptx
    return re.sub(r"(\.reqntid \d+)", rf"\1\n.maxnreg {registers}", ptx)


@call_p.def_impl
def _run(*arrays: jax.Array, **parameters: Any) -> list[jax.Array]:
    return jax.jit(functools.partial(call_p.bind, **parameters))(*arrays)


@call_p.def_abstract_eval
def _shapes(*_: Any, outs: tuple, **__: Any) -> list[jax.core.ShapedArray]:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in outs]


def _lowering(
    ctx: Any, *operands: Any, kernel, outs, grid, warps, tiles, registers, constants
) -> Any:
    from jax._src.lib import gpu_triton

    dtypes = tuple(str(x.dtype) for x in (*ctx.avals_in, *ctx.avals_out))
    program = compiled(kernel, dtypes, warps, tiles, constants)
    metadata = program.metadata
    if metadata.global_scratch_size:
        raise ValueError(f"{kernel.__name__} wants scratch memory")
    triton_kernel = gpu_triton.TritonKernel(
        metadata.name,
        metadata.num_warps,  # of the compiled program, all partitions counted
        1,
        metadata.shared,
        limited(program.asm["ptx"], registers),
        "",
        COMPUTE_CAPABILITY,
    )
    parameters = _parameters(kernel.arg_names[: len(dtypes)], dict(tiles), metadata)
    call = gpu_triton.TritonKernelCall(triton_kernel, *grid, parameters)
    opaque = zlib.compress(call.to_proto(f"delta_product_{kernel.__name__}", b""))
    rule = jax.ffi.ffi_lowering(TARGET, api_version=4)
    return rule(ctx, *operands, opaque=opaque)


def _parameters(names: Sequence[str], tiles: Mapping[str, Tile], metadata: Any) -> list[Any]:
    """Pointers, and for tiles descriptors, which sizes and strides follow."""
    from jax._src.lib import gpu_triton
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    described = iter(metadata.tensordesc_meta or ())
    parameters = []
    for name in names:
        if name not in tiles:
            parameters.append(gpu_triton.create_array_parameter(0, 16))
            continue
        meta, shape = next(described), tiles[name].shape
        strides = (shape[1] * shape[2], shape[2], 1)
        parameters.append(
            gpu_triton.create_tma_descriptor_parameter(
                elem_type=TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
                swizzle=meta["swizzle"],
                shape=shape,
                strides=strides,
                block_shape=meta["block_size"],
                oob_fill=0,
            )
        )
        parameters += [gpu_triton.create_scalar_parameter(x, "i32") for x in shape]
        parameters += [gpu_triton.create_scalar_parameter(x, "i64") for x in strides]
    return parameters


mlir.register_lowering(call_p, _lowering, platform="cuda")
