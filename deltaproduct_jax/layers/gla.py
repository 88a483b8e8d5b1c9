"""Gated linear attention (Yang et al., ICML 2024), with a decay of its own for every key channel.

q, k, v = x W,  alpha = sigmoid(x W_1 W_2 + b)^(1/16),  W_1 of rank 16
o = gated_linear_attention(q, k, v, log alpha)
y = (rmsnorm(o) * silu(x W_g)) W_o
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltaproduct_jax.layers.heads import HeadMixer
from deltaproduct_jax.layers.initializers import log_sigmoid_inverse
from deltaproduct_jax.layers.mixer import RecurrentMixer
from deltaproduct_jax.layers.padding import only_counted
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


class GatedLinearAttention(HeadMixer[GLAState], RecurrentMixer[GLAState]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]``, with the arguments of :class:`HeadMixer`.

    With ``allow_neg_eigval`` decays are ``2 alpha - 1``, in (-1, 1), instead of ``alpha``.
    """

    implementations, least_gate = IMPLEMENTATIONS, 0.0

    def _make(self, D, make):
        keys, values = self._widths()
        self.q_proj = make.project(D, keys)
        self.k_proj = make.project(D, keys)
        self.v_proj = make.project(D, values)
        self.gate_down = make.project(D, GATE_RANK)
        self.gate_up = make.project(GATE_RANK, keys, use_bias=True, wide=True)
        if make.initial_gate is not None:
            log_gate = jnp.full((keys,), GATE_TEMPERATURE * math.log(make.initial_gate))
            self.gate_up.bias[...] = log_sigmoid_inverse(log_gate).astype(make.param_dtype)
        self.g_proj = make.project(D, values)
        self.o_norm = make.rms_norm(self.value_dim)
        self.o_proj = make.project(values, D)

    def init_state(self, batch_size: int) -> GLAState:
        """The state before the first token: zero."""
        return GLAState(self._no_matrices(batch_size))

    def _mix(self, x, state, segment_ids, length):
        q, k, v, g, negative = self._inputs(x)
        o, recurrent = gated_linear_attention(
            q,
            only_counted(k, length),
            v,
            only_counted(g, length),
            negative=only_counted(negative, length),
            **self._options(state, segment_ids),
        )
        return self._project_out(o, self.g_proj(x)), GLAState(recurrent)

    def _token(self, x, state):
        q, k, v, g, negative = jax.tree.map(lambda a: a[:, 0], self._inputs(x))
        o, recurrent = gated_linear_attention_step(state.recurrent, q, k, v, g, negative=negative)
        return self._project_out(o[:, None], self.g_proj(x)), GLAState(recurrent)

    def _inputs(self, x: jax.Array) -> tuple[jax.Array | None, ...]:
        """q, k, v, g and the sign of the op."""
        heads = lambda u: u.reshape(*u.shape[:2], self.num_heads, -1)
        gate = self.gate_up(self.gate_down(x).astype(accumulator_dtype(self.dtype)))
        g, negative = heads(jax.nn.log_sigmoid(gate) / GATE_TEMPERATURE), None
        if self.allow_neg_eigval:
            g, negative = extended_gate(g)
        return heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x)), g, negative


register_mixer("gla", GatedLinearAttention, state=GLAState)
