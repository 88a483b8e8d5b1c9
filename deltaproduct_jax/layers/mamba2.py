"""Mamba-2 (Dao and Gu, ICML 2024): a scalar decay per head, whose step size also scales the write.

z, x', B, C = x W,  x', B, C = silu(conv(x', B, C)),  dt = softplus(x W_dt + dt_bias)
S <- alpha S + B (dt x')^T,  alpha = exp(-exp(A_log) dt),  o = S^T C + D x'
y = rmsnorm(o * silu(z)) W_o
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltaproduct_jax.layers.initializers import decay_step_init
from deltaproduct_jax.layers.mixer import RecurrentMixer
from deltaproduct_jax.layers.norm import RMSNorm
from deltaproduct_jax.layers.padding import only_counted
from deltaproduct_jax.layers.projection import convolutions, projections, value_width
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


class Mamba2(RecurrentMixer[Mamba2State]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]``.

    The published layer in the words of the others: its state size is ``head_dim``, its head width
    ``head_dim * expand_v``, its groups ``num_heads`` and its heads ``num_v_heads``. Its convolution
    has no bias here.

    Args:
        hidden_size: width ``D`` of input and output.
        num_heads: heads ``H`` of B and C, the keys and queries.
        head_dim: key width ``K`` of a head.
        num_v_heads: heads ``Hv`` of values and decays, a multiple of ``num_heads``; None for
            ``num_heads``.
        expand_v: value width over key width; ``V = head_dim * expand_v`` must be whole.
        allow_neg_eigval: decays ``2 alpha - 1`` in (-1, 1) instead of ``alpha`` in (0, 1); the
            write stays as it is.
        conv_size: taps of the convolution.
        norm_eps: epsilon of the output norm.
        initializer: ``"paper"`` or ``"fla"``, see ``layers/initializers.py``.
        initializer_range: standard deviation of ``"fla"``.
        implementation: how the op is computed: ``"recurrent"``, ``"chunked"``, None for the latter.
        chunk_size: tokens in a chunk of the op; None for 64.
        dtype: dtype of the computation. Gates, norms and the state stay in float32 at least.
        param_dtype: dtype of the parameters; A_log, dt_bias and D are float32 always.
        rngs: source of the parameter keys.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    implementations = IMPLEMENTATIONS

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        num_v_heads: int | None = None,
        expand_v: float = 1.0,
        allow_neg_eigval: bool = True,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        initializer: str = "paper",
        initializer_range: float = 0.02,
        implementation: str | None = None,
        chunk_size: int | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        value_dim = value_width(num_heads, head_dim, num_v_heads=num_v_heads, expand_v=expand_v)
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.allow_neg_eigval = allow_neg_eigval
        self.implementation, self.chunk_size = implementation, chunk_size
        self.dtype = jnp.dtype(dtype)
        project = projections(initializer, initializer_range, dtype, param_dtype, rngs)
        convolve = convolutions(initializer, initializer_range, conv_size, param_dtype, rngs)
        keys, values = num_heads * head_dim, num_v_heads * value_dim
        self.z_proj = project(hidden_size, values)
        self.xbc_proj = project(hidden_size, values + 2 * keys)
        self.xbc_conv1d = convolve(values + 2 * keys)
        self.dt_proj = project(hidden_size, num_v_heads)
        rate = jax.random.uniform(rngs.params(), (num_v_heads,), jnp.float32, 1.0, 16.0)
        self.A_log = nnx.Param(jnp.log(rate))
        self.dt_bias = nnx.Param(decay_step_init(rngs.params(), (num_v_heads,)))
        self.D = nnx.Param(jnp.ones((num_v_heads,), jnp.float32))
        self.o_norm = RMSNorm(values, eps=norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.o_proj = project(values, hidden_size)

    def init_state(self, batch_size: int) -> Mamba2State:
        """The state before the first token: all zero."""
        shape = (batch_size, self.num_v_heads, self.head_dim, self.value_dim)
        recurrent = jnp.zeros(shape, accumulator_dtype(self.dtype))
        return Mamba2State(recurrent, self.xbc_conv1d.init_state(batch_size, self.dtype))

    def _mix(self, x, state, segment_ids, length):
        (q, k, v, g, negative), values, conv = self._inputs(x, state.conv, segment_ids, length)
        o, recurrent = gated_linear_attention(
            q,
            only_counted(k, length),
            v,
            only_counted(g, length),
            negative=only_counted(negative, length),
            scale=1.0,
            initial_state=state.recurrent,
            segment_ids=segment_ids,
            implementation=self.implementation,
            chunk_size=self.chunk_size,
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
