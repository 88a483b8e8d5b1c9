"""The two initialisations that checkpoints of DeltaProduct were trained from.

``"paper"`` is what the official DeltaProduct code trains: every mixer projection keeps a
xavier-uniform draw with gain ``2**-2.5``, convolutions keep the ``U(-1/sqrt(W), 1/sqrt(W))`` of
their framework, and the MLP's output projection is scaled down with depth. ``"fla"`` is what
flash-linear-attention does today: everything, convolutions included, is ``N(0, std)``.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

INITIALIZERS: tuple[str, ...] = ("paper", "fla")

_PAPER_GAIN = 2.0**-2.5


def _uniform(bound: float) -> nnx.Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def projection_init(
    name: str, std: float, in_features: int, out_features: int, parts: int = 1
) -> nnx.Initializer:
    """Initialiser of a mixer projection ``[in_features, out_features]``.

    Args:
        name: ``"paper"`` or ``"fla"``.
        std: standard deviation that ``"fla"`` draws with.
        in_features: width of the input.
        out_features: width of the output.
        parts: how many matrices stand side by side in this one. The paper's code holds one matrix
            a Householder factor, so its fan-out is that of a single factor.
    """
    if name == "paper":
        fans = in_features + out_features // parts
        return _uniform(_PAPER_GAIN * math.sqrt(6.0 / fans))
    return nnx.initializers.normal(std)


def conv_init(name: str, std: float, conv_size: int) -> nnx.Initializer:
    """Initialiser of depthwise convolution taps ``[conv_size, channels]``."""
    return _uniform(conv_size**-0.5) if name == "paper" else nnx.initializers.normal(std)


def mlp_down_init(
    name: str, std: float, intermediate_size: int, num_layers: int
) -> nnx.Initializer:
    """Initialiser of the MLP's output projection in a model of ``num_layers`` blocks."""
    if name == "paper":
        return _uniform(intermediate_size**-0.5 / math.sqrt(2.0 * num_layers))
    return nnx.initializers.normal(std)


def decay_rate_init(key: jax.Array, shape: tuple[int, ...], least: float = 1.0) -> jax.Array:
    """``A_log`` of a forget gate: log of U(least, 16), in float32; 1 is Mamba-2's least rate."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, least, 16.0))


def decay_step_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``dt_bias`` of the forget gate: softplus of it is log-uniform in [1e-3, 1e-1], float32."""
    low, high = math.log(1e-3), math.log(1e-1)
    dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high)), 1e-4)
    return softplus_inverse(dt)


def softplus_inverse(y: jax.Array) -> jax.Array:
    """What softplus makes ``y`` of, which is above 0."""
    return y + jnp.log(-jnp.expm1(-y))


def log_sigmoid_inverse(y: jax.Array) -> jax.Array:
    """What the log of the sigmoid is ``y`` of, which is below 0."""
    return y - jnp.log(-jnp.expm1(y))
