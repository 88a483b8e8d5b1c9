"""`jax.vmap` of what launches GPU kernels: one launch over more sequences."""

import functools

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels import axis_of_rows


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
            axis = axis_of_rows(x.ndim - 1)
            x = jnp.moveaxis(x, 0, axis)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

        def part(x):
            axis = axis_of_rows(x.ndim)
            x = x.reshape(*x.shape[:axis], axis_size, -1, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        outs = batched(run, fixed)(*jax.tree.map(join, tuple(in_batched), arguments))
        return jax.tree.map(part, outs), jax.tree.map(lambda _: True, outs)

    return mapped
