"""Gated linear attention (Yang et al., ICML 2024), with a decay of its own for every key channel.

q, k, v = x W,  alpha = sigmoid(x W_1 W_2 + b)^(1/16),  W_1 of rank 16
o = gated_linear_attention(q, k, v, log alpha)
y = (rmsnorm(o) * silu(x W_g)) W_o
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltaproduct_jax.layers.mixer import RecurrentMixer
from deltaproduct_jax.layers.norm import RMSNorm
from deltaproduct_jax.layers.padding import only_counted
from deltaproduct_jax.layers.projection import projections, value_width
from deltaproduct_jax.layers.registry import register_mixer
from deltaproduct_jax.ops.baselines import (
    extended_gate,
    gated_linear_attention,
    gated_linear_attention_step,
)
from deltaproduct_jax.ops.baselines.checks import IMPLEMENTATIONS
from deltaproduct_jax.ops.exported import exported
from deltaproduct_jax.ops.precision import accumulator_dtype

GATE_RANK = 16
GATE_TEMPERATURE = 16.0


@exported
class GLAState(NamedTuple):
    """What a layer remembers: ``recurrent`` is ``[B, H, K, V]``, in float32 at least."""

    recurrent: Float[Array, "B H K V"]


class GatedLinearAttention(RecurrentMixer[GLAState]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]``.

    Args:
        hidden_size: width ``D`` of input and output.
        num_heads: heads ``H``.
        head_dim: key width ``K`` of a head.
        expand_v: value width over key width; ``V = head_dim * expand_v`` must be whole.
        allow_neg_eigval: decays ``2 alpha - 1`` in (-1, 1) instead of ``alpha`` in (0, 1).
        norm_eps: epsilon of the output norm.
        initializer: ``"paper"`` or ``"fla"``, see ``layers/initializers.py``.
        initializer_range: standard deviation of ``"fla"``.
        implementation: how the op is computed: ``"recurrent"``, ``"chunked"``, None for the latter.
        chunk_size: tokens in a chunk of the op; None for 64.
        dtype: dtype of the computation. Gates, norms and the state stay in float32 at least.
        param_dtype: dtype of the parameters.
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
        expand_v: float = 1.0,
        allow_neg_eigval: bool = True,
        norm_eps: float = 1e-5,
        initializer: str = "paper",
        initializer_range: float = 0.02,
        implementation: str | None = None,
        chunk_size: int | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        value_dim = value_width(num_heads, head_dim, expand_v=expand_v)
        self.num_heads, self.head_dim, self.value_dim = num_heads, head_dim, value_dim
        self.allow_neg_eigval = allow_neg_eigval
        self.implementation, self.chunk_size = implementation, chunk_size
        self.dtype = jnp.dtype(dtype)
        project = projections(initializer, initializer_range, dtype, param_dtype, rngs)
        keys, values = num_heads * head_dim, num_heads * value_dim
        self.q_proj = project(hidden_size, keys)
        self.k_proj = project(hidden_size, keys)
        self.v_proj = project(hidden_size, values)
        self.gate_down = project(hidden_size, GATE_RANK)
        self.gate_up = project(GATE_RANK, keys, use_bias=True, wide=True)
        self.g_proj = project(hidden_size, values)
        self.o_norm = RMSNorm(value_dim, eps=norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.o_proj = project(values, hidden_size)

    def init_state(self, batch_size: int) -> GLAState:
        """The state before the first token: zero."""
        shape = (batch_size, self.num_heads, self.head_dim, self.value_dim)
        return GLAState(jnp.zeros(shape, accumulator_dtype(self.dtype)))

    def _mix(self, x, state, segment_ids, length):
        q, k, v, g, negative = self._inputs(x)
        o, recurrent = gated_linear_attention(
            q,
            only_counted(k, length),
            v,
            only_counted(g, length),
            negative=only_counted(negative, length),
            initial_state=state.recurrent,
            segment_ids=segment_ids,
            implementation=self.implementation,
            chunk_size=self.chunk_size,
        )
        return self._output(o, x), GLAState(recurrent)

    def _token(self, x, state):
        q, k, v, g, negative = jax.tree.map(lambda a: a[:, 0], self._inputs(x))
        o, recurrent = gated_linear_attention_step(state.recurrent, q, k, v, g, negative=negative)
        return self._output(o[:, None], x), GLAState(recurrent)

    def _inputs(self, x: jax.Array) -> tuple[jax.Array | None, ...]:
        """q, k, v, g and the sign of the op."""
        heads = lambda u: u.reshape(*u.shape[:2], self.num_heads, -1)
        gate = self.gate_up(self.gate_down(x).astype(accumulator_dtype(self.dtype)))
        g, negative = heads(jax.nn.log_sigmoid(gate) / GATE_TEMPERATURE), None
        if self.allow_neg_eigval:
            g, negative = extended_gate(g)
        return heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x)), g, negative

    def _output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        o = self.o_norm(o) * nnx.silu(self.g_proj(x).reshape(o.shape))
        return self.o_proj(o.reshape(*o.shape[:2], -1))


register_mixer("gla", GatedLinearAttention, state=GLAState)
