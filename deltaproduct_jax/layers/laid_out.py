"""Layers and models whose parameters or states lie over explicit axes of a mesh.

Rows share nothing, so a batch may lie over explicit axes and all goes on as everywhere. Where a
parameter or a state lies over one, products sum over what is cut, and a reshape takes heads apart
that were cut by their widths: explicit axes ask for the layout of every array in between. So for
the time of a call the axes are the compiler's. What comes out lies as what went in: outputs as the
inputs, the new state as the old.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deltaproduct_jax.ops.parts import cut_by_rows, explicit_names, mesh_of

# Methods that return no state; all others return one beside their outputs.
STATELESS = ("for_later_blocks", "features")

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_any_layout(method: Function) -> Function:
    """A method of a layer or model that also runs where parameters or states are laid out.

    Args:
        method: takes inputs [B, ..., D] or token ids [B, ...], and may take a ``state`` by name or
            before them; returns outputs and a state, or no state, as those in `STATELESS`.
    """
    signature = inspect.signature(method)
    _, *names = signature.parameters
    inputs = next(name for name in names if name != "state")

    @functools.wraps(method)
    def laid_out(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError:  # of which Python says more itself
            return method(self, *args, **kwargs)
        args = [_by_rows(name, x) for name, x in zip(names, args, strict=False)]
        kwargs = {name: _by_rows(name, x) for name, x in kwargs.items()}
        given = signature.bind(self, *args, **kwargs).arguments
        graph, params = nnx.split(self)
        laid = [x for x in jax.tree.leaves(params) if any(_explicit_names(x))]
        laid += [x for x in jax.tree.leaves(given.get("state")) if any(_explicit_names(x)[1:])]
        is_cut = method.__name__ != "step" and any(_explicit_names(given[inputs])[1:2])
        if not laid or is_cut:  # along T, which the op refuses in a line of its own
            return method(self, *args, **kwargs)
        mesh = mesh_of(laid[0])
        shardings = _shardings_of_results(mesh, given[inputs], given.get("state"))
        leaves, tree = jax.tree.flatten(shardings)
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
        numbers = tuple((name, x) for name, x in kwargs.items() if isinstance(x, int | np.integer))
        fixed = (method, graph, axes, tuple(leaves), tree, numbers)
        arrays = {name: x for name, x in kwargs.items() if not isinstance(x, int | np.integer)}
        return _by_the_compiler(fixed, params, args, arrays)

    return cast(Function, laid_out)


def _by_rows(name: str, x: Any) -> Any:
    """An argument, of tokens not along axes of one device but by rows."""
    return x if name == "state" else cut_by_rows(x)


def _explicit_names(x: Any) -> list[tuple[str, ...]]:
    return explicit_names(x) if isinstance(x, jax.Array) else []


def _shardings_of_results(mesh: Any, x: Any, state: Any) -> tuple[Any, Any]:
    lies = lambda names: NamedSharding(mesh, PartitionSpec(*(entry or None for entry in names)))
    of_x = _explicit_names(x)
    if state is None:
        return lies(of_x), lies(of_x[:1])
    return lies(of_x), jax.tree.map(lambda s: lies(_explicit_names(s)), state)


@functools.partial(jax.jit, static_argnums=0)
def _by_the_compiler(fixed: tuple, params: Any, args: tuple, more: dict[str, Any]) -> Any:
    method, graph, names, shardings, tree, numbers = fixed
    of_outputs, of_state = tree.unflatten(shardings)
    method_of = functools.partial(method, **dict(numbers))
    run = lambda params, args, more: method_of(nnx.merge(graph, params), *args, **more)
    out_sharding = of_outputs if method.__name__ in STATELESS else (of_outputs, of_state)
    return jax.sharding.auto_axes(run, axes=names, out_sharding=out_sharding)(params, args, more)
