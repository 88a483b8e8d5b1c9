"""Refuses forward-mode differentiation by name, under any jit, and lets reverse mode through.

A `jax.custom_vjp` function refuses it too, but under a jit of the caller with a text of JAX's own,
which names no remedy. So inputs pass through an identity whose tangents pass through a primitive:
linear, and transposed as reverse mode asks of it, it raises where forward mode would lower it.

Kernels, which JAX cannot differentiate, refuse a second derivative in the same way.
"""

import functools
from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

NO_FORWARD_MODE = (
    "delta_product: chunked and kernel implementations have a backward pass and no forward-mode "
    'derivative (jvp, jacfwd); name implementation="recurrent" or "associative" for that'
)
NO_SECOND_DERIVATIVE = (
    "delta_product: kernels have a backward pass that cannot be differentiated again; name "
    'implementation="chunked" for second derivatives'
)


def reverse_only(tree):
    """The arrays of a tree, as they are; whoever pushes tangents through them meets a TypeError."""
    return jax.tree.map(
        lambda x: _identity(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


@functools.cache
def differentiated_once(run: Callable, text: str = NO_SECOND_DERIVATIVE) -> Callable:
    """``run(*arrays, **options)``, a pass of a kernel; whoever differentiates it reads ``text``."""

    def refusing(*arrays, **options):
        @jax.custom_jvp
        def kernel(*arrays):
            return run(*arrays, **options)

        @kernel.defjvp
        def _refuse_again(*_):
            raise TypeError(text)

        return kernel(*arrays)

    return refusing


@jax.custom_jvp
def _identity(x):
    return x


@_identity.defjvp
def _identity_jvp(primals, tangents):
    # The primal passes by, so that the gradient itself may be differentiated in either mode; but
    # by an empty part of it a gradient of a tangent meets the error below, not one of JAX's own.
    (x,), (tangent,) = primals, tangents
    return x, _tangent_p.bind(tangent, x[..., :0])


def _refuse(*_, **__):
    raise TypeError(NO_FORWARD_MODE)


_tangent_p = jax.extend.core.Primitive("delta_product_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda x, _: x)
ad.deflinear2(_tangent_p, lambda cotangent, *_: [cotangent, None])
# A tangent of this tangent comes of forward mode alone, and JAX would name a primitive of its own.
ad.primitive_jvps[_tangent_p] = _refuse
batching.primitive_batchers[_tangent_p] = lambda operands, axes: (
    _tangent_p.bind(*operands),
    axes[0],
)
mlir.register_lowering(_tangent_p, _refuse)
