"""Arrays that a function draws, each laid out over a mesh as soon as it is there.

As one program, which draws every array where it lies, the parameters of 24 layers take XLA minutes
to compile, since each array has a generator of its own. Operation by operation the programs are
those of the shapes, of which layers share most.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def laid_out(make: Callable[[], Any], shardings: Any) -> Any:
    """What ``make()`` returns, bit for bit, with each array laid out as ``shardings`` say.

    Args:
        make: draws arrays from what it closes over; called once, to be traced. All processes of a
            mesh must call it alike.
        shardings: the same tree of `jax.sharding.Sharding`.

    Returns:
        the tree of arrays. One whole array at a time is on the first device of a process, besides
        what lies there.
    """
    program, shapes = jax.make_jaxpr(make, return_shape=True)()
    wanted = jax.tree.structure(shapes).flatten_up_to(shardings)
    jaxpr = program.jaxpr
    places = collections.defaultdict(list)
    for place, var in enumerate(jaxpr.outvars):
        places[var if isinstance(var, core.Var) else None].append(place)
    # What is still asked for; whatever nobody asks for any more is freed.
    uses = collections.Counter(
        var for eqn in jaxpr.eqns for var in eqn.invars if isinstance(var, core.Var)
    )
    values: dict[Any, Any] = {}
    results: list[Any] = [None] * len(jaxpr.outvars)

    def define(var: Any, value: Any) -> None:
        for place in places.get(var, ()):
            results[place] = _placed(value, wanted[place])
        if uses[var]:
            values[var] = value

    for place in places.get(None, ()):
        results[place] = _placed(jaxpr.outvars[place].val, wanted[place])
    for var, value in zip(jaxpr.constvars, program.consts, strict=True):
        define(var, value)
    for eqn in jaxpr.eqns:
        given = [values[v] if isinstance(v, core.Var) else v.val for v in eqn.invars]
        bound = eqn.primitive.get_bind_params(eqn.params)
        # Some versions of JAX have functions apart, for primitives that drawing does not use.
        functions, settings = bound if isinstance(bound, tuple) else ((), bound)
        found = eqn.primitive.bind(*functions, *given, **settings)
        del given
        for var in eqn.invars:
            if isinstance(var, core.Var):
                uses[var] -= 1
                if not uses[var]:
                    values.pop(var, None)
        many = eqn.primitive.multiple_results
        for var, value in zip(eqn.outvars, found if many else [found], strict=True):
            define(var, value)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _placed(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of its own over the mesh; every process has all of ``value``."""
    value = jax.numpy.asarray(value)
    if sharding.is_fully_addressable:
        # What is donated to a step must be nobody else's.
        return jax.device_put(value, sharding, may_alias=False)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
