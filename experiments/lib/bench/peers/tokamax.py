"""The delta attention of tokamax for TPU and its VJP; its package is imported only when called.

Kimi Delta Attention has one factor a token and a decay for every channel of a key, of which one
decay a token is a case. It wants heads first. More factors are interleaved: a sequence R times
longer whose queries are zero but at a token's last update, and whose gates are but at its first.
The package has no kernel for TPU that is the op and has a gradient with one decay a head: its other
one, ``causal_conv1d_gated_delta_rule``, applies a convolution and SiLU first, and has none.
"""

import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp

from deltaproduct_jax.errors import ConfigError
from experiments.lib.bench.peers.jax_packages import at, in_sequence

NAME = "tokamax"
# The version whose interface this is; "mosaic" is the package's name of its Pallas kernels for TPU.
VERSION = "0.0.17"
KERNELS = "mosaic"
REMEDY = (
    f"peer={NAME} needs package tokamax, which is not installed: pip install --no-deps "
    f"tokamax=={VERSION}, and what it imports, on Python 3.12"
)


def require() -> str:
    """The package's version.

    Raises:
      ConfigError: it is missing.
    """
    if importlib.util.find_spec("tokamax") is None:
        raise ConfigError(REMEDY)
    return f"tokamax {importlib.metadata.version('tokamax')}"


def op(q, k, v, beta, g=None, *, chunk_size=None):
    """The peer on the arrays that `delta_product` takes; it has one chunk size, 64."""
    del chunk_size
    require()
    import tokamax.config
    from tokamax._src.ops.kda.api import kimi_delta_attention

    B, T, R, H, K = k.shape
    g = jnp.zeros((B, T, H), jnp.float32) if g is None else g
    q, g = at(q, R - 1, R), at(g, 0, R)
    k, v, beta = (in_sequence(x) for x in (k, v, beta))
    gates = jnp.broadcast_to(g[..., None], (*g.shape, K))
    with tokamax.config.cross_compile(True):  # else it asks for a TPU on this machine
        o, state = kimi_delta_attention(
            *(_heads_first(x) for x in (q, k, v, gates, beta)),
            output_final_state=True,
            implementation=KERNELS,
        )
    return jnp.moveaxis(o, 0, 2)[:, R - 1 :: R], state[:, 0]


def _heads_first(x: jax.Array) -> jax.Array:
    """[B, T, H, ...] to [H, B, T, ...]."""
    return jnp.moveaxis(x, 2, 0)
