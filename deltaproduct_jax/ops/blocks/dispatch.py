"""Whether a GPU's kernels may be launched on rows, and what then runs on which platform."""

import functools
from collections.abc import Callable, Sequence

import jax

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.parts import explicit_names


def may_launch(x: jax.Array, *sources: jax.Array) -> bool:
    """Whether Triton is there, all sizes are numbers, and nothing lies over explicit axes.

    Of an ``x`` that is yet to be made only shape and dtype are known; ``sources`` are what it is
    made of, and tell how it will lie.
    """
    return (
        kernels.is_installed("triton")
        and all(isinstance(size, int) for size in x.shape)
        and not any(any(explicit_names(a)) for a in (x, *sources))
    )


def by_kernel_or_plain(
    by_kernel: Callable, plain: Callable, layouts: Sequence[str], out_layouts: Sequence[str]
) -> Callable:
    """A kernel on a GPU, plainly elsewhere, where it is mapped and where it is differentiated.

    What comes back takes an `OnTokens` or None first, then arrays of these layouts.
    """

    @jax.custom_batching.custom_vmap
    def of_gpu(*arrays):
        return by_kernel(*arrays)

    @of_gpu.def_vmap
    def _mapped(axis_size, in_batched, *arrays):
        del axis_size
        outs = jax.vmap(plain, [0 if batched else None for batched in in_batched])(*arrays)
        return outs, jax.tree.map(lambda _: True, outs)

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def run(on_tokens, *arrays):
        kernel = of_gpu
        if on_tokens is not None:
            kernel = functools.partial(on_tokens, of_gpu, layouts, out_layouts)
        runs = {"cuda": kernel} if kernels.is_installed("triton") else {}
        return jax.lax.platform_dependent(*arrays, **runs, default=plain)

    @run.defjvp
    def _differentiated(on_tokens, primals, tangents):
        return run(on_tokens, *primals), jax.jvp(plain, primals, tangents)[1]

    return run


def flat(x: jax.Array) -> jax.Array:
    """The rows of all tokens one after another, [N, D], as kernels take them."""
    return x.reshape(-1, x.shape[-1])
