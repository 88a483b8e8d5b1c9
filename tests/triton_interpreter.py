"""Launches the project's Triton kernels in Triton's interpreter: no GPU, no torch.

``TRITON_INTERPRET=1`` must be in the environment before Triton is imported. The interpreter asks
its arguments for a pointer and a dtype, and for the little of torch's interface that `Tensor` has.
"""

import functools
import re
import threading
import types

import jax
import numpy as np

# The interpreter keeps much in global variables, and JAX would call back from several threads; of
# several devices it does.
jax.config.update("jax_cpu_enable_async_dispatch", False)
_ONE_AT_A_TIME = threading.Lock()


class _Dtype:
    def __init__(self, name: str):
        self.name = name

    def __str__(self) -> str:
        return self.name


@functools.cache
def _dtype(name: str) -> _Dtype:
    """One object a dtype: Triton remembers them by address."""
    return _Dtype(name)


class Tensor:
    """A NumPy array that the interpreter takes for one of torch."""

    def __init__(self, array: np.ndarray):
        self.array = np.ascontiguousarray(array)
        self.dtype = _dtype(self.array.dtype.name)
        self.shape = self.array.shape
        self.device = "cpu"

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def size(self):
        return self.shape

    def stride(self):
        return tuple(size // self.array.itemsize for size in self.array.strides)

    def storage_offset(self) -> int:
        return 0

    def new_empty(self, *_, **__):
        return Tensor(self.array[:0])

    def set_(self, storage, *_):
        self.__init__(storage.array)

    def copy_(self, other):
        self.array[...] = other.array


def _inline_asm(self, code, _, values, *__):
    """What the interpreter lacks: assembly reads a program id, or is what kernels say it is."""
    from triton.runtime.interpreter import TensorHandle

    if "ctaid" in code:
        axis = "xyz".index(re.fullmatch(r"mov.u32 \$0, %ctaid.([xyz]);", code)[1])
        program_id = self.create_get_program_id(axis)
        return types.SimpleNamespace(get_result=lambda _: program_id)
    [x] = values
    if "ex2.approx" in code:
        with np.errstate(over="ignore"):
            found = (1 / (1 + np.exp(-x.data, dtype=np.float32)),)
    else:
        found = (_wide(x),)
    handles = [TensorHandle(y, _float32()) for y in found]
    return types.SimpleNamespace(get_result=handles.__getitem__)


def _float32():
    import triton.language as tl

    return tl.float32


def _wide(handle) -> np.ndarray:
    """Numbers of a handle of the interpreter, which keeps those of bfloat16 as integers."""
    if str(handle.dtype.scalar) == "bf16":
        return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _dot(self, a, b, accumulator, *_):
    """Products of bfloat16 too, which are those of float32."""
    from triton.runtime.interpreter import TensorHandle

    dtype = accumulator.data.dtype
    product = np.matmul(_wide(a), _wide(b), dtype=dtype) + accumulator.data
    return TensorHandle(product, accumulator.dtype.scalar)


@functools.cache
def _prepared():
    """Triton's interpreter as kernels here need it; returns what a launch begins with."""
    from triton.runtime import interpreter

    patch_tensor, patch = interpreter._patch_lang_tensor, interpreter._patch_lang
    patched = set()

    def patch_tensor_and_index(tensor, scope):
        """NumPy makes no index of an array of one number, which scalars are here: loops' bounds."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def patch_once(function):
        """Every call of a function within a kernel would do it again, which takes half the time."""
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    interpreter._patch_lang_tensor, interpreter._patch_lang = patch_tensor_and_index, patch_once
    convert = interpreter._convert_float

    def convert_to_nearest(x, given, wanted, mode):
        """What is rounded to bfloat16 is cut off there."""
        if (str(given), str(wanted)) != ("fp32", "bf16"):
            return convert(x, given, wanted, mode)
        bits = x.view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)

    interpreter._convert_float = convert_to_nearest
    builder = interpreter.InterpreterBuilder
    builder.create_inline_asm, builder.create_dot = _inline_asm, _dot
    return patched.clear


def call(name: str, arrays, outs, grid, launch, *, meta, aliases=None):
    """Stands in for `passes.call`; a kernel "..._in_place" has no pointer of its own for what
    takes an input's place, as jax-triton 0.4 has it.
    """
    from deltaproduct_jax.ops.kernels import grids
    from deltaproduct_jax.ops.kernels.triton import kernels

    del launch
    begin = _prepared()
    kernel = getattr(kernels, name)
    grid, line = grids.fitted(name, grid, kernel.arg_names)

    def run(*arrays):
        inputs = [Tensor(np.array(x)) for x in arrays]
        # What a kernel leaves unwritten must show.
        results = [Tensor(np.full(out.shape, np.nan, out.dtype)) for out in outs]
        for taken, given in (aliases or {}).items():
            results[given] = inputs[taken]
        named = {**meta, **line}.items()
        constants = {key: value for key, value in named if key in kernel.arg_names}
        in_place = (aliases or {}).values() if name.endswith("_in_place") else ()
        given = [x for index, x in enumerate(results) if index not in in_place]
        with _ONE_AT_A_TIME:
            begin()
            kernel[grid](*inputs, *given, **constants)
        return tuple(x.array for x in results)

    return jax.pure_callback(run, tuple(outs), *arrays)
