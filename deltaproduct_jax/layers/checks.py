"""The contract of layers: every error a caller can see is raised here, before any arithmetic.

:class:`SequenceMixer` puts these checks before the constructors and calls of its subclasses, those
of plug-ins too. They look at types, shapes and dtypes, which are known while a program is traced;
a compiled one pays nothing. Dimension letters: B batch, T tokens, D model width.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.layers.initializers import INITIALIZERS
from deltaproduct_jax.ops import checks
from deltaproduct_jax.settings import kept, misfit, unheld

Function = TypeVar("Function", bound=Callable[..., Any])

# What keywords of these names may be in any layer, beside what their annotations say.
SIZES = (
    "hidden_size", "in_features", "num_heads", "num_v_heads", "head_dim", "num_householder",
    "conv_size", "max_length", "width", "channels", "intermediate_size", "num_layers",
    "num_kv_heads", "window_size",
)  # fmt: skip
POSITIVE = ("eps", "norm_eps", "initializer_range", "rope_theta")
DTYPES = ("dtype", "param_dtype")


def checks_arguments(init: Function) -> Function:
    """An ``__init__`` that first checks its arguments: by their annotations, and by their names.

    A class that takes ``implementation`` says in ``implementations`` what that may be.

    Raises:
        ConfigError: naming the argument, what it got and what it may be.
    """
    signature = inspect.signature(init)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    # What is passed on is checked where it arrives.
    defaults = {
        n: each.default for n, each in signature.parameters.items() if each.kind not in several
    }

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:  # a name missing or misspelt, of which Python says more itself
            return init(self, *args, **kwargs)
        given, hints = bound.arguments, _hints(init)
        values = {n: given[n] for n in given if n in defaults and given[n] is not defaults[n]}
        _check_values(values, hints, getattr(self, "implementations", ()))
        # Products of NumPy's narrow integers, as widths are, would overflow.
        given.update({n: kept(x, hints[n]) for n, x in values.items() if n in hints})
        init(*bound.args, **bound.kwargs)
        if "hidden_size" in given:
            self.hidden_size = given["hidden_size"]

    return typing.cast(Function, checked)


@functools.cache
def _hints(init: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(init, include_extras=True)
    except NameError:  # of a name that is there for type checkers only
        return {}


def _check_values(
    values: Mapping[str, Any], hints: Mapping[str, Any], implementations: Iterable[str]
) -> None:
    for name, value in values.items():
        problem = misfit(value, hints[name], name) if name in hints else None
        if problem is None and isinstance(value, float):
            problem = unheld(name, value)
        if problem is not None:
            raise ConfigError(problem)
        if value is None:
            continue
        if name in SIZES:
            require_at_least(name, value, 1)
        if name in POSITIVE and not value > 0:
            raise ConfigError(f"{name}={value!r} must be greater than 0")
        if name == "initializer":
            require_one_of(name, value, INITIALIZERS)
    try:
        for name in DTYPES:
            if name in values:
                checks.as_dtype(name, values[name])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if implementations:
        check_options(values.get("implementation"), values.get("chunk_size"), implementations)


def check_options(implementation: Any, chunk_size: Any, available: Iterable[str]) -> None:
    """ConfigError unless both are known and go together."""
    try:
        checks.check_implementation(implementation, tuple(available))
        checks.check_chunk_size(chunk_size, implementation)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def checks_sequences(call: Function) -> Function:
    """A method ``(x, *, state=, segment_ids=, mask=)`` of a mixer that first checks these.

    With ``num_segments`` among what else it takes, the state is one of every segment.
    """

    @functools.wraps(call)
    def checked(
        self: Any,
        x: Any,
        *,
        state: Any = None,
        segment_ids: Any = None,
        mask: Any = None,
        **more: Any,
    ) -> Any:
        x = as_inputs(x, ("B", "T", "D"), self)
        segment_ids, mask = as_rows(x.shape[:2], segment_ids, mask)
        S = more.get("num_segments")
        if S is not None:
            S = more["num_segments"] = checks.check_segments(S, segment_ids)
        if state is not None:
            state = as_state("state", state, self, *(n for n in (x.shape[0], S) if n is not None))
        return call(self, x, state=state, segment_ids=segment_ids, mask=mask, **more)

    return typing.cast(Function, checked)


def checks_token(step: Function) -> Function:
    """A method ``(state, x)`` of a mixer, for one token a row, that first checks these."""

    @functools.wraps(step)
    def checked(self: Any, state: Any, x: Any, **more: Any) -> Any:
        refuse_swapped(state, x)
        x = as_inputs(x, ("B", "D"), self)
        state = as_state("state", state, self, x.shape[0])
        return _returned(step, step(self, state, x, **more), self, x, state)

    return typing.cast(Function, checked)


def checks_outputs(call: Function) -> Function:
    """A method as `checks_sequences` has it, of which what it returns is checked."""

    @functools.wraps(call)
    def checked(self: Any, x: jax.Array, *, state: Any = None, **read: Any) -> Any:
        found = call(self, x, state=state, **read)
        if state is None:
            rows = (x.shape[0], read.get("num_segments"))
            state = jax.eval_shape(lambda: states_of(self, *rows))
        return _returned(call, found, self, x, state)

    return typing.cast(Function, checked)


def checks_mixed(mix: Function) -> Function:
    """A method ``(x, state, ...)`` of a `RecurrentMixer`, of which what it returns is checked."""

    @functools.wraps(mix)
    def checked(self: Any, x: jax.Array, state: Any, *more: Any) -> Any:
        return _returned(mix, mix(self, x, state, *more), self, x, state)

    return typing.cast(Function, checked)


def _returned(
    method: Callable[..., Any], found: Any, mixer: Any, x: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    """The outputs and state that a mixer returns; ConfigError unless they are as what came in.

    Outputs of another shape would be broadcast when they are added to the model's, and an array of
    two rows would be taken apart into two results.
    """
    place = f"{type(mixer).__name__}.{method.__name__}"
    if type(found) is not tuple or len(found) != 2:
        raise ConfigError(f"{place} must return outputs and a state, got {_describe(found)}")
    y, after = found
    if not isinstance(y, jax.Array) or y.shape != x.shape:
        raise ConfigError(
            f"{place} must return outputs of the shape of x, {x.shape}, got {_describe(y)}"
        )
    try:
        return y, as_like(f"the state after {place}", after, state)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def checks_batch_size(init_state: Function) -> Function:
    """A method ``(batch_size)`` that first checks it, and then the rows that it returns."""

    @functools.wraps(init_state)
    def checked(self: Any, batch_size: Any) -> Any:
        rows = checks.check_size("batch_size", batch_size, 0)
        state = init_state(self, rows)
        for path, leaf in jax.tree.leaves_with_path(state):
            if not isinstance(leaf, jax.Array | np.ndarray) or leaf.shape[:1] != (rows,):
                place = f"{type(self).__name__}.init_state(){jax.tree_util.keystr(path)}"
                raise ConfigError(
                    f"{place} must be an array of batch_size={rows} rows, got {_describe(leaf)}"
                )
        return state

    return typing.cast(Function, checked)


def as_inputs(x: Any, layout: tuple[str, ...], layer: Any) -> jax.Array:
    """``x`` as a JAX array; ValueError unless it is one of floats, of the layer's width."""
    x = checks.as_array("x", x)
    width = getattr(layer, "hidden_size", None)
    checks.check_shape("x", x.shape, layout, {} if width is None else {"D": width})
    checks.check_floating("x", x.dtype)
    return x


def check_width(name: str, x: Any, width: int) -> None:
    """ValueError unless ``x`` is an array whose last axis has this size."""
    x = checks.as_array(name, x)
    if not x.ndim or x.shape[-1] != width:
        raise ValueError(f"{name} must have a last axis of size {width}, got shape {x.shape}")


def as_rows(
    shape: tuple[int, ...], segment_ids: Any, mask: Any
) -> tuple[jax.Array | None, jax.Array | None]:
    """Both as JAX arrays; ValueError unless they are ids and truths, one for every token."""
    sizes = dict(zip(("B", "T"), shape, strict=True))
    if segment_ids is not None:
        segment_ids = checks.as_array("segment_ids", segment_ids)
        checks.check_shape("segment_ids", segment_ids.shape, ("B", "T"), sizes)
        checks.check_segment_dtype(segment_ids.dtype)
    if mask is not None:
        mask = checks.as_array("mask", mask)
        checks.check_shape("mask", mask.shape, ("B", "T"), sizes)
        if mask.dtype != bool:
            raise ValueError(
                f"mask must have dtype bool, False at padding, got {mask.dtype.name}; "
                "mask != 0 makes it one"
            )
    return segment_ids, mask


def refuse_swapped(state: Any, x: Any) -> None:
    """ValueError if what stands for the state is an array, and the other is none."""
    array = jax.Array | np.ndarray
    if isinstance(state, array) and not isinstance(x, array):
        raise ValueError(
            f"the state comes first, got {_describe(state)} before {_describe(x)}; swap the two"
        )


def as_state(name: str, state: Any, mixer: Any, *rows: int) -> Any:
    """``state`` in JAX arrays; ValueError unless ``mixer`` could have made it for so many rows.

    Of two numbers the second is of segments, each of which has a state.
    """
    return as_like(name, state, jax.eval_shape(lambda: states_of(mixer, *rows)))


def states_of(mixer: Any, batch_size: int, num_segments: int | None = None) -> Any:
    """The state of a mixer or model before the first token, of every row or every segment."""
    if num_segments is None:
        return mixer.init_state(batch_size)
    state = mixer.init_state(batch_size * num_segments)
    return jax.tree.map(lambda x: x.reshape(batch_size, num_segments, *x.shape[1:]), state)


def as_like(name: str, tree: Any, like: Any) -> Any:
    """``tree`` in JAX arrays; ValueError unless its class, shapes and dtypes are those of ``like``.

    Args:
        name: of the argument.
        tree: a named tuple of arrays, or of such.
        like: the same of shapes and dtypes.
    """
    wanted = type(like).__name__
    if type(tree) is not type(like) and not isinstance(like, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{name} must be a {wanted}, as init_state makes it, got {_describe(tree)}"
        )
    is_none = lambda x: x is None
    leaves, structure = jax.tree.flatten_with_path(like, is_leaf=is_none)
    if jax.tree.structure(tree, is_leaf=is_none) != structure:
        raise ValueError(
            f"{name} must hold what a {wanted} of init_state holds, {structure}, got "
            f"{jax.tree.structure(tree)}"
        )
    found = []
    for (path, want), leaf in zip(leaves, jax.tree.leaves(tree, is_leaf=is_none), strict=True):
        place = f"{name}{jax.tree_util.keystr(path)}"
        if want is None and leaf is None:
            found.append(leaf)
            continue
        if want is not None:
            leaf = checks.as_array(place, leaf)
        if want is None or (leaf.shape, leaf.dtype) != (want.shape, want.dtype):
            raise ValueError(
                f"{place} must be {_describe(want)}, as init_state makes it for as many rows, got "
                f"{_describe(leaf)}"
            )
        found.append(leaf)
    return jax.tree.unflatten(structure, found)


def _describe(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return "None" if value is None else f"a {type(value).__name__}"
