"""Kimi Delta Attention (2025, https://arxiv.org/abs/2510.26692), and its complex form.

    q, k, v = act(conv(x W)),  beta = sigmoid(x W_b) [* 2],  f = x W_1 W_2 + dt_bias, W_1 of rank V
    S <- (I - beta k k^T) diag(alpha) S + beta k v^T,  o = S^T q / sqrt(K),  q, k unit vectors
    y = (rmsnorm(o) * sigmoid(x W_3 W_4 + b)) W_o

Of every key channel, alpha = exp(-exp(A_log) softplus(f)) is in (0, 1). The complex form (Siems et
al., 2026, https://arxiv.org/abs/2609.24797) takes it from [-1, 1]: two reflections, that of beta
near 2 and that of negative channels, make a rotation, whose eigenvalues are complex.

Parametrisations are those of flash-linear-attention and of that paper's code.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deltaproduct_jax.layers.delta_rule import DeltaRuleMixer
from deltaproduct_jax.layers.padding import only_counted
from deltaproduct_jax.layers.projection import Parts
from deltaproduct_jax.layers.registry import register_mixer
from deltaproduct_jax.layers.short_conv import check_convolutions, idle_of_convolutions
from deltaproduct_jax.ops.baselines import channel_delta, channel_delta_step
from deltaproduct_jax.ops.baselines.checks import IMPLEMENTATIONS
from deltaproduct_jax.ops.exported import exported
from deltaproduct_jax.ops.linear import unit_vectors
from deltaproduct_jax.ops.precision import accumulator_dtype

# The least magnitude of a gate that may be negative, as published.
LEAST_GATE = math.exp(-5.0)
# The paper's state-tracking models: values as wide as keys, neither gate nor convolution.
DEFAULTS = {"expand_v": 1.0, "use_output_gate": False, "use_short_conv": False}


@exported
class KimiDeltaState(NamedTuple):
    """What a layer remembers of the tokens so far.

    Attributes:
        recurrent: ``[B, Hv, K, V]``, in float32 at least.
        q_conv, k_conv, v_conv: ``[B, conv_size - 1, channels]``, the last inputs of each short
            convolution; ``[B, 0, 0]`` without convolutions.
    """

    recurrent: Float[Array, "B Hv K V"]
    q_conv: Float[Array, "B past q_channels"]
    k_conv: Float[Array, "B past k_channels"]
    v_conv: Float[Array, "B past v_channels"]


class KimiDeltaAttention(DeltaRuleMixer[KimiDeltaState]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]``, with the arguments of :class:`DeltaRuleMixer`."""

    implementations, least_gate = IMPLEMENTATIONS, 0.0

    def _make(self, D, make):
        keys, values = self._widths()
        for name, width in (("q", keys), ("k", keys), ("v", values)):
            setattr(self, f"{name}_proj", make.project(D, width))
            self._make_convolution(make, name, width)
        self.b_proj = make.project(D, self.num_v_heads)
        self._make_gates(D, make)
        if self.use_output_gate:
            self.output_gate_down = make.project(D, self.value_dim)
            self.output_gate_up = make.project(self.value_dim, values, use_bias=True)
        self.o_norm = make.rms_norm(self.value_dim)
        self.o_proj = make.project(values, D)

    def _make_gates(self, D: int, make: Parts) -> None:
        """The parameters that `_gates` and `_erasure` read."""
        channels = self.num_v_heads * self.head_dim
        self.gate_down = make.project(D, self.value_dim)
        self.gate_up = make.project(self.value_dim, channels, wide=True)
        self._make_decay(make, channels)

    def init_state(self, batch_size: int) -> KimiDeltaState:
        """The state before the first token: all zero."""
        return KimiDeltaState(self._no_matrices(batch_size), *self._no_inputs(batch_size))

    def _mix(self, x, state, segment_ids, length):
        inputs, tails = self._inputs(x, state, segment_ids, length)
        for name in ("beta", "g", "gamma", "negative"):
            inputs[name] = only_counted(inputs[name], length)
        o, recurrent = channel_delta(
            **inputs,
            **self._options(state, segment_ids),
        )
        return self._output(o, x), KimiDeltaState(recurrent, *tails)

    def _token(self, x, state):
        inputs, tails = self._inputs(x, state, None, None)
        inputs = jax.tree.map(lambda a: a[:, 0], inputs)
        o, recurrent = channel_delta_step(state.recurrent, **inputs)
        return self._output(o[:, None], x), KimiDeltaState(recurrent, *tails)

    def _inputs(self, x, state, segment_ids, length):
        """Arguments of the op along T, by name, and the states of the convolutions."""
        read = lambda name: getattr(self, f"{name}_proj")(x)
        (q, k, v), tails = self._convolved(read, state, segment_ids, length)
        q, k = self._unit(q, self.num_heads), self._unit(k, self.num_heads)
        v = v.reshape(*x.shape[:2], self.num_v_heads, -1)
        g, negative = self._gates(x)
        e, gamma = self._erasure(x)
        # Keys are not rounded: beta near 2 makes those that are a little too long grow.
        arguments = {"q": q.astype(self.dtype), "k": k, "v": v, "beta": self._sizes(self.b_proj(x))}
        return arguments | {"g": g, "negative": negative, "e": e, "gamma": gamma}, tails

    def _unit(self, u: jax.Array, num_heads: int) -> jax.Array:
        """Unit vectors of all value heads, in float32 at least."""
        u = u.reshape(*u.shape[:2], num_heads, self.head_dim).astype(accumulator_dtype(self.dtype))
        return jnp.repeat(unit_vectors(u), self.num_v_heads // num_heads, axis=2)

    def _gate_inputs(self, x: jax.Array) -> jax.Array:
        """``x W_1 W_2``, of all channels along one axis, in float32 at least."""
        return self.gate_up(self.gate_down(x).astype(accumulator_dtype(self.dtype)))

    def _rate_and_f(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``exp(A_log)`` ``[1, 1, Hv, 1]`` and f ``[B, T, Hv, K]``."""
        f = self._gate_inputs(x)
        f = f + self.dt_bias[...].astype(f.dtype)[None, None]
        rate = jnp.exp(self.A_log[...].astype(f.dtype)).reshape(1, 1, -1, 1)
        return rate, f.reshape(*f.shape[:2], self.num_v_heads, self.head_dim)

    def _gates(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Log of the gates' magnitudes, and where they are negative."""
        rate, f = self._rate_and_f(x)
        return -rate * jax.nn.softplus(f), None

    def _erasure(self, x: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """Addresses that are erased before the write, and how much; neither here."""
        return None, None

    def _output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        gate = self.output_gate_up(self.output_gate_down(x)) if self.use_output_gate else None
        return self._project_out(o, gate, jax.nn.sigmoid)


class ComplexKimiDeltaAttention(KimiDeltaAttention):
    """:class:`KimiDeltaAttention` with gates in [-1, 1], and the same arguments.

    With a = 2 sigmoid(exp(A_log) f) - 1 the gate has the sign of a and the magnitude
    ``LEAST_GATE + (1 - LEAST_GATE) |a|``. It starts where the other form's does, but below 0 in
    every other channel, and so with ``initial_gate``.
    """

    least_gate = LEAST_GATE

    def _make_gates(self, D, make):
        super()._make_gates(D, make)
        self.A_log = nnx.Param(jnp.zeros((self.num_v_heads,), jnp.float32))
        alpha = jnp.exp(-jax.nn.softplus(self.dt_bias[...]))
        if make.initial_gate is not None:
            alpha = jnp.full_like(alpha, make.initial_gate)
        start = 2 * jnp.arctanh((alpha - LEAST_GATE) / (1 - LEAST_GATE))
        sign = 1 - 2 * (jnp.arange(start.shape[0], dtype=start.dtype) % 2)
        self.dt_bias = nnx.Param(sign * start)

    def _gates(self, x):
        rate, f = self._rate_and_f(x)
        u = rate * f
        # 1 - |a| = 2 sigmoid(-|u|), which near gates of 1 and -1 keeps all its digits.
        return jnp.log1p(-2 * (1 - LEAST_GATE) * jax.nn.sigmoid(-jnp.abs(u))), u < 0


def register_channel_delta(name: str, layer: type[KimiDeltaAttention]) -> None:
    """Registers a mixer whose fields are those of :class:`KimiDeltaAttention`."""
    register_mixer(
        name,
        layer,
        state=KimiDeltaState,
        defaults=DEFAULTS,
        check=check_convolutions,
        idle=idle_of_convolutions,
    )


register_channel_delta("kimi_delta_attention", KimiDeltaAttention)
register_channel_delta("complex_kimi_delta_attention", ComplexKimiDeltaAttention)
