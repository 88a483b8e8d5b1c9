"""What the baselines with a matrix of every head as their state do alike over whole sequences."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from deltaproduct_jax.ops.baselines.checks import check_arrays, check_options
from deltaproduct_jax.ops.checks import check_scale
from deltaproduct_jax.ops.parts import on_each_part

STATE = ("B", "H", "K", "V")
Arrays = Mapping[str, jax.Array | None]
Layouts = Mapping[str, tuple[str, ...]]


def check_together(
    arrays: Arrays,
    layouts: Layouts,
    state: jax.Array | None,
    *,
    segment_ids: jax.Array | None = None,
    one_token: bool = False,
) -> None:
    """ValueError unless arrays and state fit each other, see :func:`check_arrays`.

    Args:
        arrays: by name, or None.
        layouts: of them.
        state: of every head: ``state`` with one token, else ``initial_state``, which may be None.
        segment_ids: of sequences, or None.
        one_token: the layouts stand without their axis T.
    """
    together = {name: (array, " ".join(layouts[name])) for name, array in arrays.items()}
    together["state" if one_token else "initial_state"] = (state, " ".join(STATE))
    check_arrays(together | {"segment_ids": (segment_ids, "B T")}, one_token)


def run_checked(
    run: Callable[..., tuple[jax.Array, jax.Array]],
    arrays: Arrays,
    layouts: Layouts,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    scale: float | None,
    implementation: Any,
    chunk_size: Any,
) -> tuple[jax.Array, jax.Array]:
    """``run`` on every part of checked arguments: outputs and final state.

    Args:
        run: takes the arrays by name, with ``initial_state`` and ``segment_ids`` behind them, and
            as keywords ``scale``, ``implementation`` and ``chunk_size``.
        arrays: by name, q and v among them, or None.
        layouts: of them.
        initial_state, segment_ids, scale, implementation, chunk_size: as
            :func:`gated_linear_attention` takes them.
    """
    check_together(arrays, layouts, initial_state, segment_ids=segment_ids)
    q = arrays["q"]
    options = check_options(implementation, chunk_size, q.shape[1])
    return on_each_part(
        functools.partial(run, scale=check_scale(scale, q.shape[-1]), **options),
        {**arrays, "initial_state": initial_state, "segment_ids": segment_ids},
        {**layouts, "initial_state": STATE, "segment_ids": ("B", "T")},
        (layouts["v"], STATE),
    )
