"""Erase-then-Delta Attention (Li et al., 2026, https://arxiv.org/abs/2606.26560).

    e = l2norm(x W_1 W_2), of rank 16 in every head,  gamma = sigmoid(x W_c) [* 2]
    S <- (I - beta k k^T) (I - gamma e e^T) diag(alpha) S + beta k v^T
    log alpha = l (1 - exp(-exp(A_log) softplus(f) / |l|)),  l = -5,  f of rank 16 in every head

and all else as in Kimi Delta Attention. What is stored at e is taken away before anything is
written at k: DeltaProduct with two factors, of which the first has no value, and a decay of its own
for every channel.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deltaproduct_jax.layers.kimi_delta import KimiDeltaAttention, register_channel_delta
from deltaproduct_jax.layers.projection import Parts
from deltaproduct_jax.ops.precision import accumulator_dtype

RANK = 16
LEAST_LOG_DECAY = -5.0


class HeadMaps(nnx.Module):
    """A linear map of low rank for every head, ``[B, T, D] -> [B, T, H, width]``.

    Args:
        in_features: width ``D`` of the input.
        num_heads: heads ``H``.
        rank: of the map of every head.
        width: of the output of every head.
        make: makes linear maps. The second product is taken in float32 at least.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        rank: int,
        width: int,
        *,
        make: Parts,
    ):
        self.num_heads, self.wide = num_heads, jnp.dtype(accumulator_dtype(make.dtype))
        self.down = make.project(in_features, num_heads * rank)
        # The maps of all heads are drawn as one matrix of so many columns.
        drawn = make.project(rank, num_heads * width).kernel[...]
        self.up = nnx.Param(jnp.moveaxis(drawn.reshape(rank, num_heads, width), 1, 0))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H width"]:
        """Applies the maps to every token."""
        low = self.down(x).astype(self.wide)
        low = low.reshape(*low.shape[:2], self.num_heads, -1)
        return jnp.einsum("bthr,hrk->bthk", low, self.up[...].astype(self.wide))


class EraseThenDelta(KimiDeltaAttention):
    """:class:`KimiDeltaAttention` that erases before it writes; its arguments are the same.

    With ``allow_neg_eigval`` gamma is in (0, 2) as well, and with ``beta_bias`` it has a bias too:
    what is erased may be reflected. The paper has both step sizes in (0, 1) and no bias.
    """

    least_gate, step_sizes = math.exp(LEAST_LOG_DECAY), ("b", "c")

    def _make_gates(self, D, make):
        heads, K = self.num_v_heads, self.head_dim
        self.decay = HeadMaps(D, heads, RANK, K, make=make)
        self.erase = HeadMaps(D, heads, RANK, K, make=make)
        self.c_proj = make.project(D, heads)
        self._make_decay(make, heads * K)

    def _gate_inputs(self, x: jax.Array) -> jax.Array:
        f = self.decay(x)
        return f.reshape(*f.shape[:2], -1)

    def _gates(self, x):
        rate, f = self._rate_and_f(x)
        # l (1 - exp(y / l)), which for small y is -y.
        return -LEAST_LOG_DECAY * jnp.expm1(rate * jax.nn.softplus(f) / LEAST_LOG_DECAY), None

    def _decay_of(self, gate):
        return LEAST_LOG_DECAY * math.log1p(-math.log(gate) / LEAST_LOG_DECAY)

    def _erasure(self, x):
        e = self.erase(x)
        return self._unit(e, self.num_v_heads), self._sizes(self.c_proj(x), "c_bias")


register_channel_delta("erase_then_delta", EraseThenDelta)
