"""Gated delta rules of other JAX packages as programs of our benchmarks, imported when asked for.

Each is the package's chunked form in plain JAX, called through its own interface with its own chunk
size. What has one factor per token is given the published interleaved form: a sequence R times
longer whose queries are zero but at the last update of a token, and whose gates are but at the
first.
"""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deltaproduct_jax.errors import ConfigError
from experiments.lib.bench.peers.plain import plain

# Package to install (MODULE is what it holds), by the name for --peer.
PACKAGES = {"jla": "jax-linear-attention", "ejkernel": "ejkernel"}
PLAIN = "plain"
MODULES = {"jla": "jla.ops.chunked", "ejkernel": "ejkernel.kernels._xla.gated_delta_rule"}


def peer_op(name: str) -> Callable:
    """The peer as a function of the arrays that `delta_product` takes: q, k, v, beta and maybe g.

    ``"plain"`` is no package and is always there.

    Raises:
        ConfigError: its package is missing or does not import.
    """
    if name == PLAIN:
        return plain
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        raise ConfigError(
            f"peer={name} needs the package {PACKAGES[name]}: {error}; install it, or leave it"
        ) from error
    return {"jla": _jla, "ejkernel": _ejkernel}[name](module)


def _jla(module) -> Callable:
    def op(q, k, v, beta, g=None):
        R = k.shape[2]
        g = jnp.zeros(v.shape[:2] + v.shape[3:4], jnp.float32) if g is None else g
        k, v, beta = (in_sequence(x) for x in (k, v, beta))
        return module.gated_delta_product(
            q, k, v, g, beta, num_householder=R, output_final_state=True
        )

    return op


def _ejkernel(module) -> Callable:
    def op(q, k, v, beta, g=None):
        R = k.shape[2]
        g = jnp.zeros(v.shape[:2] + v.shape[3:4], jnp.float32) if g is None else g
        k, v, beta = (in_sequence(x) for x in (k, v, beta))
        o, state = module.gated_delta_rule(
            at(q, R - 1, R), k, v, beta, at(g, 0, R), use_qk_l2norm=False
        )
        return o[:, R - 1 :: R], state

    return op


def in_sequence(x: jax.Array) -> jax.Array:
    """[B, T, R, ...] to [B, T * R, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def at(x: jax.Array, place: int, R: int) -> jax.Array:
    """[B, T, ...] to [B, T * R, ...]: x at one update of every token, zero at the others."""
    spread = jnp.zeros((*x.shape[:2], R, *x.shape[2:]), x.dtype).at[:, :, place].set(x)
    return in_sequence(spread)
