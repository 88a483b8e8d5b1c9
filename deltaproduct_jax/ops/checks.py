"""The contract of the op: every error a caller can see is raised here, before any arithmetic.

Dimension letters: B batch, T tokens, R Householder factors per token, H key heads, Hv value heads,
K key width, V value width.
"""

import contextlib
import contextvars
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.ops.precision import PRECISIONS, accumulator_dtype
from deltaproduct_jax.settings import misfit, unheld

DTYPES = ("bfloat16", "float16", "float32", "float64")

LAYOUT = {
    "q": ("B", "T", "H", "K"),
    "k": ("B", "T", "R", "H", "K"),
    "v": ("B", "T", "R", "Hv", "V"),
    "beta": ("B", "T", "R", "Hv"),
    "g": ("B", "T", "Hv"),
    "segment_ids": ("B", "T"),
    "initial_state": ("B", "Hv", "K", "V"),
    "state": ("B", "Hv", "K", "V"),
    "o": ("B", "T", "Hv", "V"),
}

OPTIONAL = ("g", "initial_state", "segment_ids")
MASKS = ("mask", "negative")


def as_arrays(**arguments: Any) -> dict[str, jax.Array | None]:
    """Each by `as_array`; of `OPTIONAL` some may be None, and stay so."""
    return {
        name: None if value is None and name in OPTIONAL else as_array(name, value)
        for name, value in arguments.items()
    }


def as_array(name: str, value: Any) -> jax.Array:
    """``value`` as a JAX array; ValueError unless it is an array already (NumPy's count).

    Integers of NumPy's must fit the dtype that JAX makes of them: it would cut off what does not,
    so that an id became another.
    """
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise ValueError(f"{name} must be a JAX or NumPy array, got {type(value).__name__}")
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name} must be an array without a mask of NumPy's; fill it")
    if not jnp.issubdtype(value.dtype, jnp.number) and value.dtype != bool:
        raise ValueError(f"{name} must be an array of numbers or of bool, got {value.dtype}")
    if not value.dtype.isnative:
        raise ValueError(
            f"{name} must have this machine's order of bytes, got {value.dtype.str}; "
            "x.astype(x.dtype.newbyteorder('=')) has it"
        )
    array = jnp.asarray(value)
    if array.dtype != value.dtype and jnp.issubdtype(value.dtype, jnp.integer) and value.size:
        _check_held(name, value, array.dtype)
    return array


def _check_held(name: str, value: np.ndarray | np.generic, dtype: np.dtype) -> None:
    """ValueError unless integers, of which there is one at least, are the same in ``dtype``."""
    least, most, held = int(np.min(value)), int(np.max(value)), np.iinfo(dtype)
    if least < held.min or most > held.max:
        raise ValueError(
            f"{name} must hold integers from {held.min} to {held.max}, which {dtype.name} can, got "
            f"some from {least} to {most}; jax.config.update('jax_enable_x64', True) keeps "
            f"{value.dtype.name}"
        )


def check_inputs(
    arrays: dict[str, jax.Array | None],
    *,
    one_token: bool = False,
) -> dict[str, int]:
    """Checks shapes and dtypes of q, k, v, beta and, where not None, g, states and segment_ids.

    Args:
      arrays: by argument name, q first; the first array with a dimension fixes its size.
      one_token: the arrays are those of one token, without the axis T.

    Returns:
      The size of every dimension.

    Raises:
      ValueError: names the argument, what it got and what it may be.
    """
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        if array is not None:
            layout = tuple(d for d in LAYOUT[name] if not (one_token and d == "T"))
            check_shape(name, array.shape, layout, sizes)
    if sizes["Hv"] % sizes["H"]:
        raise ValueError(
            f"v has Hv={sizes['Hv']} value heads and k has H={sizes['H']} key heads; "
            "Hv must be a multiple of H (each key head serves a group of Hv/H value heads)"
        )
    check_dtypes(arrays, same=("k", "v"))
    return sizes


def check_segments(num_segments: Any, segment_ids: Any) -> int:
    """How many; ValueError unless there may be so many segments, and ids say which is which."""
    number = check_size("num_segments", num_segments, 1)
    if segment_ids is None:
        raise ValueError(
            f"num_segments={num_segments} needs segment_ids; without them a row is one segment"
        )
    return number


def check_states(
    states: jax.Array | None, num_segments: int, sizes: dict[str, int], dtype: np.dtype
) -> tuple[int, ...]:
    """The shape of states by segment; ValueError if ``states`` has another shape or dtype."""
    layout = ("B", "S", "Hv", "K", "V")
    sizes = sizes | {"S": num_segments}
    if states is not None:
        check_shape("initial_state", states.shape, layout, sizes)
        check_dtypes({"q": jnp.zeros((), dtype), "initial_state": states})
    return tuple(sizes[d] for d in layout)


def check_shape(
    name: str, shape: tuple[int, ...], layout: tuple[str, ...], sizes: dict[str, int]
) -> None:
    """ValueError unless ``shape`` has the sizes of ``layout``; adds those that were not known."""
    wanted = "[" + ", ".join(layout) + "]"
    known = ", ".join(f"{d}={sizes[d]}" for d in layout if d in sizes)
    known = f" with {known}" if known else ""
    if len(shape) != len(layout):
        hint = ""
        if {"T", "R"} <= set(layout) and len(shape) == len(layout) - 1:
            hint = f"; an array [B, T*R, ...] becomes {wanted} by a reshape"
        raise ValueError(
            f"{name} must have {_dimensions(len(layout))} {wanted}{known}, "
            f"got {len(shape)}: shape {shape}{hint}"
        )
    for dimension, size in zip(layout, shape, strict=True):
        if sizes.setdefault(dimension, size) != size:
            raise ValueError(
                f"{name} must have shape {wanted}{known}, got {shape}: "
                f"{dimension} is {size} instead of {sizes[dimension]}"
            )
        if size == 0 and dimension not in ("B", "T"):
            raise ValueError(f"{name} must have {dimension} of at least 1, got shape {shape}")


def _dimensions(count: int) -> str:
    return f"{count} dimension{'' if count == 1 else 's'}"


def check_dtypes(arrays: Mapping[str, jax.Array | None], same: Iterable[str] = ()) -> None:
    """Compares the dtypes of arrays with that of the first, which the op must compute in.

    Args:
      arrays: by argument name, of states ``name.field`` too; None passes.
      same: names of those that have its very dtype. States have the accumulator's, ids integers,
        masks bool, and all others either the first's or the accumulator's.

    Raises:
      ValueError: names the argument, what it got and what it may be.
    """
    first, dtype = next((name, array.dtype) for name, array in arrays.items())
    check_floating(first, dtype)
    wide = accumulator_dtype(dtype)
    for name, array in arrays.items():
        if array is None:
            continue
        if name == "segment_ids":
            check_segment_dtype(array.dtype)
        elif name in MASKS:
            if array.dtype != bool:
                raise ValueError(f"{name} must have dtype bool, got {array.dtype.name}")
        else:
            is_state = name.partition(".")[0] in ("state", "initial_state")
            allowed = {wide} if is_state else {dtype} if name in same else {dtype, wide}
            if array.dtype not in allowed:
                names = " or ".join(sorted(d.name for d in allowed))
                raise ValueError(
                    f"{name} must be {names} when {first} is {dtype.name}, got {array.dtype.name}; "
                    f"cast it with {name}.astype(...)"
                )


def check_floating(name: str, dtype: np.dtype) -> None:
    """ValueError unless the op computes in ``dtype``."""
    if dtype.name not in DTYPES:
        raise ValueError(f"{name} must have a dtype among {', '.join(DTYPES)}, got {dtype.name}")


def as_dtype(name: str, value: Any) -> np.dtype:
    """``value`` as the dtype that it names; ValueError unless the op computes in it."""
    try:
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise ValueError(f"{name}={value!r} must be a dtype among {', '.join(DTYPES)}")
    return dtype


def check_segment_dtype(dtype: np.dtype, name: str = "segment_ids") -> None:
    """ValueError unless ids of segments may have this dtype."""
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{name} must have an integer dtype, got {dtype.name}; "
            "one id per token, a new segment wherever the id changes"
        )


def check_size(name: str, size: Any, minimum: int) -> int:
    """``size`` as a Python int, as those of NumPy's overflow; it may be symbolic, and is then kept.

    ValueError unless it is a whole number of at least ``minimum``.
    """
    if jax.export.is_symbolic_dim(size):
        return size
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {size!r}")
    return int(size)


def check_flag(name: str, value: Any) -> None:
    """ValueError unless ``value`` is True or False; the text "false" would count as true."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_scale(scale: Any, key_width: int) -> float:
    """The number that multiplies q: ``scale``, or K**-0.5 for None."""
    if scale is None:
        return key_width**-0.5
    known = isinstance(scale, numbers.Real | np.number) and not isinstance(scale, bool)
    if not known:
        raise ValueError(
            f"scale must be a Python number or None (K**-0.5), got {type(scale).__name__}; "
            "a computed or learnt scale belongs on q: delta_product(scale * q, ..., scale=1)"
        )
    problem = misfit(scale, float, "scale") or unheld("scale", scale)
    if problem is not None:
        raise ValueError(f"{problem}; None is K**-0.5")
    return float(scale)


def check_chunk_size(chunk_size: Any, implementation: str | None) -> int | None:
    """``chunk_size`` as a Python int; ValueError unless None or a positive int that is used."""
    if chunk_size is None:
        return None
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int | np.integer):
        raise ValueError(
            f"chunk_size must be an int (tokens in a chunk) or None, got {chunk_size!r}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}; None picks one")
    if implementation not in (None, "chunked"):
        raise ValueError(
            f"chunk_size={chunk_size} has no meaning for implementation={implementation!r}; "
            "leave it None, or name 'chunked'"
        )
    return int(chunk_size)


def check_implementation(
    implementation: Any, available: tuple[str, ...], argument: str = "implementation"
) -> None:
    """ValueError unless ``implementation``, the ``argument``, is None or one of ``available``."""
    if implementation is not None and implementation not in available:
        names = ", ".join(repr(name) for name in available)
        raise ValueError(
            f"{argument}={implementation!r} is not available; it may be one of {names}, "
            "or None for a choice by platform and shape"
        )


def check_precision(precision: Any) -> str | None:
    """The precision by its name in lower case; a `jax.lax.Precision` is taken as well."""
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    if precision is not None and not (isinstance(precision, str) and precision in PRECISIONS):
        names = ", ".join(repr(name) for name in PRECISIONS)
        raise ValueError(
            f"precision={precision!r} is not known; it may be {names}, None or a jax.lax.Precision"
        )
    return precision


_KNOWN_FINITE: contextvars.ContextVar[bool] = contextvars.ContextVar("known_finite", default=False)


def is_known_finite() -> bool:
    """Whether what is being traced has finite operands, as whoever calls has seen to it."""
    return _KNOWN_FINITE.get()


@contextlib.contextmanager
def known_finite() -> Iterator[None]:
    """Inside, the op need not look at its operands, only at their cotangents.

    It is to be entered where a trace begins and ends: a program found again does not look here. An
    operand that overflows all the same may then spread in its row, as a state that does.
    """
    token = _KNOWN_FINITE.set(True)
    try:
        yield
    finally:
        _KNOWN_FINITE.reset(token)
