"""`jax.vmap` of what launches GPU kernels: one launch over more sequences."""

import functools

import jax
import jax.numpy as jnp


def batched(run, fixed):
    """``run(fixed, ...)`` with a batching rule: a mapped axis joins the axis of sequences.

    That is the first of every array, but the second of kept states.
    """
    mapped = jax.custom_batching.custom_vmap(functools.partial(run, fixed))

    @mapped.def_vmap
    def rule(axis_size, in_batched, *arguments):
        def join(is_mapped, x):
            if not is_mapped:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            axis = _sequence_axis(x.ndim - 1)
            x = jnp.moveaxis(x, 0, axis)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

        def part(x):
            axis = _sequence_axis(x.ndim)
            x = x.reshape(*x.shape[:axis], axis_size, -1, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        outs = batched(run, fixed)(*jax.tree.map(join, tuple(in_batched), arguments))
        return jax.tree.map(part, outs), jax.tree.map(lambda _: True, outs)

    return mapped


def _sequence_axis(rank: int) -> int:
    """The first, but in arrays of kept states [spans, B, H, G, K, V]."""
    return 1 if rank == 6 else 0
