"""Checks of values, for debugging: what no error can say while shapes and dtypes alone are known.

They are off, and leave no trace in any program, but inside :func:`checked`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from deltaproduct_jax.ops.precision import accumulator_dtype

Function = TypeVar("Function", bound=Callable[..., Any])

# A context that jit takes part in: a program made without the checks is not used with them.
_checking = jax.make_user_context(False)

# By how much a vector that was normalised in a dtype may be longer than 1, in units of rounding.
ROUNDING = 8


def checked(function: Function) -> Function:
    """``function`` with the values looked at that it gives to the op and to models.

    ==========  ====================================================================
    keys        no longer than 1 without ``use_qk_l2norm``: with longer ones the state
                grows without bound, to NaN at last
    beta        in [0, 2]
    g           at most 0
    token ids   below ``vocab_size`` and not negative, padding excepted
    ``length``  of a transformer's state: below ``max_length``
    ==========  ====================================================================

    A NaN is out of every range. It costs a pass over these arrays and a wait for the result. One
    thing escapes: JAX drops checks inside a `jax.lax.scan` that is differentiated as a whole; there
    give the function without its gradient.

    >>> import jax.numpy as jnp
    >>> from deltaproduct_jax.ops import checked, delta_product
    >>> k = 3 * jnp.ones((1, 4, 1, 1, 8))
    >>> o, state = checked(delta_product)(k[:, :, 0], k, k, k[..., 0])
    Traceback (most recent call last):
    ...
    ValueError: k must hold vectors of length 1 at most, got one of length 8.4852...

    Args:
        function: what `jax.jit` could take, jitted or not: an op, a model's call, a gradient of
            either, a step of training. Arguments that are no arrays must be hashable.

    Returns:
        A function of the same arguments and results; it is jitted.

    Raises:
        ValueError: by what is returned, once it has run: the first value that is out of range; or
            where it is called inside a transformation.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def run(form: tuple, arrays: list[jax.Array]) -> Any:
        tree, others = form

        def of_arrays(arrays: list[jax.Array]) -> Any:
            given = iter(arrays)
            leaves = [next(given) if is_array else value for is_array, value in others]
            args, kwargs = jax.tree.unflatten(tree, leaves)
            return function(*args, **kwargs)

        return checkify.checkify(of_arrays, errors=checkify.user_checks)(arrays)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        _refuse_traced(leaves)
        are = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        others = tuple((a, None if a else x) for a, x in zip(are, leaves, strict=True))
        with _checking(True):
            error, result = run((tree, others), [x for a, x in zip(are, leaves, strict=True) if a])
        _refuse_traced(jax.tree.leaves(error))  # by arrays that the function closes over
        text = error.get()
        if text is not None:
            raise ValueError(text.split(" (`check` failed")[0])
        return result

    return call


def _refuse_traced(arrays: list[Any]) -> None:
    """ValueError if JAX is tracing, when arrays have no values."""
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        raise ValueError(
            "checked looks at values, and there are none inside jit, grad, vmap or another "
            "checked; put it outermost, as checked(jax.grad(f)) for jax.grad(checked(f))"
        )


def is_checking() -> bool:
    """Whether a program is being made for :func:`checked`."""
    return _checking.value


def nan_if(flags: jax.Array, x: jax.Array) -> jax.Array:
    """``x`` with NaN where ``flags``, bool of its rank and wherever 1 may stand, are up.

    Under `jax.debug_nans` there is no NaN where no flag is up, in no operation: it would be taken
    for the fault.
    """
    nan = jnp.sqrt(-flags.astype(x.dtype)) if jax.config.jax_debug_nans else jnp.nan
    return jnp.where(flags, nan, x)


def require(holds: jax.Array, text: str, **numbers: jax.Array) -> None:
    """An error of :func:`checked` unless all of ``holds``; ``text`` has places for ``numbers``."""
    checkify.check(jnp.all(holds), text, **numbers)


def check_op_values(
    k: jax.Array, beta: jax.Array, g: jax.Array | None, *, use_qk_l2norm: bool
) -> None:
    """Looks at keys, step sizes and decays, inside :func:`checked` only."""
    if not is_checking():
        return
    if not use_qk_l2norm:
        wide = k.astype(accumulator_dtype(k.dtype))
        lengths = jnp.sqrt(jnp.sum(wide * wide, axis=-1))
        require(
            lengths <= 1 + ROUNDING * float(jnp.finfo(k.dtype).eps),  # NaN is not, in no maximum
            "k must hold vectors of length 1 at most, got one of length {longest}; divide by the "
            "length, or say use_qk_l2norm=True",
            longest=jnp.max(lengths, initial=0),
        )
    check_range("beta", beta, 0, 2)
    if g is not None:
        check_range("g", g, None, 0)


def check_range(name: str, x: jax.Array, low: int | None, high: int) -> None:
    """Looks, inside :func:`checked` only, whether ``x`` is within bounds; NaN is not."""
    if not is_checking():
        return
    wide = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    least, most = jnp.min(wide, initial=high), jnp.max(wide, initial=high if low is None else low)
    bounds = f"at most {high}" if low is None else f"in [{low}, {high}]"
    holds = wide <= high if low is None else (wide >= low) & (wide <= high)
    text = f"{name} must be {bounds}, got values from {{least}} to {{most}}"
    require(holds, text, least=least, most=most)
