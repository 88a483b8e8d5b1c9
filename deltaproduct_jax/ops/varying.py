"""Inside shard_map every array has a type that says over which mesh axes it varies.

A scan's carry keeps its type, and a cotangent has that of its primal, so arrays made here, or given
replicated by the caller, are first marked as varying over the axes of the others. Outside shard_map
nothing happens.
"""

import jax
import jax.numpy as jnp


def mark_varying(x: jax.Array, axes: frozenset) -> jax.Array:
    """``x``, marked as varying over ``axes`` too."""
    missing = tuple(sorted(axes - _axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def mark_all_varying(tree):
    """Every array of the tree, marked as varying over the union of their axes."""
    axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: mark_varying(x, axes), tree)


def zeros_varying_as(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Zeros of ``shape`` with the dtype and the mesh axes of ``like``."""
    return mark_varying_as(jnp.zeros(shape, like.dtype), like)


def mark_varying_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """``x``, marked as varying over the mesh axes of ``like``."""
    return mark_varying(x, _axes(like))


def _axes(x: jax.Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying
