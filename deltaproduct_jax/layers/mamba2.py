"""Mamba-2 (Dao and Gu, ICML 2024): a scalar decay per head, whose step size also scales the write.

z, x', B, C = x W,  x', B, C = silu(conv(x', B, C)),  dt = softplus(x W_dt + dt_bias)
S <- alpha S + B (dt x')^T,  alpha = exp(-exp(A_log) dt),  o = S^T C + D x'
y = rmsnorm(o * silu(z)) W_o
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deltaproduct_jax.layers.heads import HeadMixer, HeadOptions
from deltaproduct_jax.layers.mixer import RecurrentMixer
from deltaproduct_jax.layers.padding import only_counted
from deltaproduct_jax.layers.registry import register_mixer
from deltaproduct_jax.layers.short_conv import segment_runs
from deltaproduct_jax.ops.baselines import (
    extended_gate,
    gated_linear_attention,
    gated_linear_attention_step,
)
from deltaproduct_jax.ops.baselines.checks import IMPLEMENTATIONS
from deltaproduct_jax.ops.exported import exported
from deltaproduct_jax.ops.precision import accumulator_dtype


@exported
class Mamba2State(NamedTuple):
    """What a layer remembers of the tokens so far.

    Attributes:
        recurrent: ``[B, Hv, K, V]``, in float32 at least.
        conv: ``[B, conv_size - 1, channels]``, the last inputs of the convolution.
    """

    recurrent: Float[Array, "B Hv K V"]
    conv: Float[Array, "B past channels"]


class Mamba2(HeadMixer[Mamba2State], RecurrentMixer[Mamba2State]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]``.

    The published layer in the words of the others: its state size is ``head_dim``, its head width
    ``head_dim * expand_v``, its groups ``num_heads`` and its heads ``num_v_heads``. Its convolution
    has no bias here.

    Args:
        hidden_size: width ``D`` of input and output.
        num_v_heads: heads ``Hv`` of values and decays, a multiple of ``num_heads``, those of B and
            C, the keys and queries; None for ``num_heads``.
        conv_size: taps of the convolution.
        **shared: as in :class:`HeadMixer`. With ``allow_neg_eigval`` decays are ``2 alpha - 1``, in
            (-1, 1), instead of ``alpha``; the write stays as it is. D is float32 always.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    implementations, least_gate = IMPLEMENTATIONS, 0.0

    def __init__(
        self,
        hidden_size: int,
        *,
        num_v_heads: int | None = None,
        conv_size: int = 4,
        **shared: Unpack[HeadOptions],
    ):
        if num_v_heads is not None:
            self.num_v_heads = num_v_heads
        self.conv_size = conv_size
        super().__init__(hidden_size, **shared)

    def _make(self, D, make):
        keys, values = self._widths()
        self.z_proj = make.project(D, values)
        self.xbc_proj = make.project(D, values + 2 * keys)
        self.xbc_conv1d = make.convolve(values + 2 * keys, self.conv_size)
        self.dt_proj = make.project(D, self.num_v_heads)
        self._make_decay(make, self.num_v_heads)
        self.D = nnx.Param(jnp.ones((self.num_v_heads,), jnp.float32))
        self.o_norm = make.rms_norm(values)
        self.o_proj = make.project(values, D)

    def init_state(self, batch_size: int) -> Mamba2State:
        """The state before the first token: all zero."""
        conv = self.xbc_conv1d.init_state(batch_size, self.dtype)
        return Mamba2State(self._no_matrices(batch_size), conv)

    def _mix(self, x, state, segment_ids, length):
        (q, k, v, g, negative), values, conv = self._inputs(x, state.conv, segment_ids, length)
        o, recurrent = gated_linear_attention(
            q,
            only_counted(k, length),
            v,
            only_counted(g, length),
            negative=only_counted(negative, length),
            scale=1.0,
            **self._options(state, segment_ids),
        )
        return self._output(o, values, x), Mamba2State(recurrent, conv)

    def _token(self, x, state):
        inputs, values, conv = self._inputs(x, state.conv, None, None)
        q, k, v, g, negative = jax.tree.map(lambda a: a[:, 0], inputs)
        o, recurrent = gated_linear_attention_step(
            state.recurrent, q, k, v, g, negative=negative, scale=1.0
        )
        return self._output(o[:, None], values, x), Mamba2State(recurrent, conv)

    def _inputs(self, x, conv, segment_ids, length):
        """Arguments of the op along T, the values before their step size, the conv's state."""
        B, T, _ = x.shape
        H, Hv, K, V = self.num_heads, self.num_v_heads, self.head_dim, self.value_dim
        wide = accumulator_dtype(self.dtype)
        xbc, conv = self.xbc_conv1d(self.xbc_proj(x), conv, segment_runs(segment_ids), length)
        values = xbc[..., : Hv * V].reshape(B, T, Hv, V)
        keys = xbc[..., Hv * V :].reshape(B, T, 2, H, K)
        k, q = jnp.moveaxis(jnp.repeat(keys, Hv // H, axis=3), 2, 0)
        param = lambda p: p[...].astype(wide)[None, None]
        dt = jax.nn.softplus(self.dt_proj(x).astype(wide) + param(self.dt_bias))
        g, negative = -jnp.exp(param(self.A_log)) * dt, None
        if self.allow_neg_eigval:
            g, negative = extended_gate(g)
        v = (values.astype(wide) * dt[..., None]).astype(self.dtype)
        return (q, k, v, g, negative), values, conv

    def _output(self, o: jax.Array, values: jax.Array, x: jax.Array) -> jax.Array:
        o = o + self.D[...].astype(self.dtype)[None, None, :, None] * values
        o = o.reshape(*o.shape[:2], -1) * nnx.silu(self.z_proj(x))
        return self.o_proj(self.o_norm(o))


register_mixer("mamba2", Mamba2, state=Mamba2State)
