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
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltaproduct_jax.errors import require_one_of
from deltaproduct_jax.layers.delta_product import QK_ACTIVATIONS
from deltaproduct_jax.layers.initializers import decay_step_init
from deltaproduct_jax.layers.mixer import RecurrentMixer
from deltaproduct_jax.layers.norm import RMSNorm
from deltaproduct_jax.layers.padding import only_counted
from deltaproduct_jax.layers.projection import convolutions, projections, value_width
from deltaproduct_jax.layers.registry import register_mixer
from deltaproduct_jax.layers.short_conv import check_conv_size, idle_conv_size, segment_runs
from deltaproduct_jax.ops.api import L2NORM_EPSILON
from deltaproduct_jax.ops.baselines import channel_delta, channel_delta_step
from deltaproduct_jax.ops.baselines.checks import IMPLEMENTATIONS
from deltaproduct_jax.ops.exported import exported
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


class KimiDeltaAttention(RecurrentMixer[KimiDeltaState]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]``.

    Args:
        hidden_size: width ``D`` of input and output.
        num_heads: heads ``H`` of queries and keys.
        head_dim: key width ``K`` of a head.
        num_v_heads: heads ``Hv`` of values, gates and step sizes, a multiple of ``num_heads``; None
            for ``num_heads``.
        expand_v: value width over key width; ``V = head_dim * expand_v`` must be whole.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        use_output_gate: gate the normalised output by ``sigmoid(x W_3 W_4 + b)``.
        use_short_conv: causal convolution over ``conv_size`` tokens on q, k and v.
        conv_size: taps of the convolution.
        qk_activation: ``"silu"`` or ``"none"`` on q and k; v always has SiLU.
        beta_bias: starting value of a learnt bias before the sigmoid of every step size; None for
            no bias, as published.
        norm_eps: epsilon of the output norm.
        initializer: ``"paper"`` or ``"fla"``, see ``layers/initializers.py``.
        initializer_range: standard deviation of ``"fla"``.
        implementation: how the op is computed: ``"recurrent"``, ``"chunked"``, None for the latter.
        chunk_size: tokens in a chunk of the op; None for the op's choice.
        dtype: dtype of the computation. Gates, norms and the state stay in float32 at least.
        param_dtype: dtype of the parameters; A_log and dt_bias are float32 always.
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
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        qk_activation: str = "silu",
        beta_bias: float | None = None,
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
        require_one_of("qk_activation", qk_activation, QK_ACTIVATIONS)
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.allow_neg_eigval = allow_neg_eigval
        self.use_output_gate, self.use_short_conv = use_output_gate, use_short_conv
        self.qk_activation, self.beta_bias = qk_activation, beta_bias
        self.implementation, self.chunk_size = implementation, chunk_size
        self.dtype, self.param_dtype = jnp.dtype(dtype), jnp.dtype(param_dtype)

        project = projections(initializer, initializer_range, dtype, param_dtype, rngs)
        convolve = convolutions(initializer, initializer_range, conv_size, param_dtype, rngs)
        keys, values = num_heads * head_dim, num_v_heads * value_dim
        for name, width in (("q", keys), ("k", keys), ("v", values)):
            setattr(self, f"{name}_proj", project(hidden_size, width))
            if use_short_conv:
                act = nnx.silu if name == "v" else QK_ACTIVATIONS[qk_activation]
                setattr(self, f"{name}_conv1d", convolve(width, act))
        self.b_proj = project(hidden_size, num_v_heads)
        if beta_bias is not None:
            self.b_bias = nnx.Param(jnp.full((num_v_heads,), beta_bias, param_dtype))
        self._make_gates(hidden_size, project, rngs)
        if use_output_gate:
            self.output_gate_down = project(hidden_size, value_dim)
            self.output_gate_up = project(value_dim, values, use_bias=True)
        self.o_norm = RMSNorm(value_dim, eps=norm_eps, dtype=dtype, param_dtype=param_dtype)
        self.o_proj = project(values, hidden_size)

    def _make_gates(
        self, hidden_size: int, project: Callable[..., nnx.Linear], rngs: nnx.Rngs
    ) -> None:
        """The parameters that `_gates` and `_erasure` read."""
        channels = self.num_v_heads * self.head_dim
        self.gate_down = project(hidden_size, self.value_dim)
        self.gate_up = project(self.value_dim, channels, wide=True)
        rate = jax.random.uniform(rngs.params(), (self.num_v_heads,), jnp.float32, 1.0, 16.0)
        self.A_log = nnx.Param(jnp.log(rate))
        self.dt_bias = nnx.Param(decay_step_init(rngs.params(), (channels,)))

    def init_state(self, batch_size: int) -> KimiDeltaState:
        """The state before the first token: all zero."""
        shape = (batch_size, self.num_v_heads, self.head_dim, self.value_dim)
        recurrent = jnp.zeros(shape, accumulator_dtype(self.dtype))
        if not self.use_short_conv:
            return KimiDeltaState(recurrent, *[jnp.zeros((batch_size, 0, 0), self.dtype)] * 3)
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return KimiDeltaState(recurrent, *[c.init_state(batch_size, self.dtype) for c in convs])

    def _mix(self, x, state, segment_ids, length):
        inputs, tails = self._inputs(x, state, segment_ids, length)
        for name in ("beta", "g", "gamma", "negative"):
            inputs[name] = only_counted(inputs[name], length)
        o, recurrent = channel_delta(
            **inputs,
            initial_state=state.recurrent,
            segment_ids=segment_ids,
            implementation=self.implementation,
            chunk_size=self.chunk_size,
        )
        return self._output(o, x), KimiDeltaState(recurrent, *tails)

    def _token(self, x, state):
        inputs, tails = self._inputs(x, state, None, None)
        inputs = jax.tree.map(lambda a: a[:, 0], inputs)
        o, recurrent = channel_delta_step(state.recurrent, **inputs)
        return self._output(o[:, None], x), KimiDeltaState(recurrent, *tails)

    def _inputs(self, x, state, segment_ids, length):
        """Arguments of the op along T, by name, and the states of the convolutions."""
        run, tails = segment_runs(segment_ids), []
        mixed = {}
        for name, tail in (("q", state.q_conv), ("k", state.k_conv), ("v", state.v_conv)):
            u = getattr(self, f"{name}_proj")(x)
            if self.use_short_conv:
                u, tail = getattr(self, f"{name}_conv1d")(u, tail, run, length)
            else:
                u = nnx.silu(u) if name == "v" else QK_ACTIVATIONS[self.qk_activation](u)
            mixed[name] = u
            tails.append(tail)
        q, k = (self._unit(mixed[name], self.num_heads) for name in ("q", "k"))
        v = mixed["v"].reshape(*x.shape[:2], self.num_v_heads, -1)
        g, negative = self._gates(x)
        e, gamma = self._erasure(x)
        # Keys are not rounded: beta near 2 makes those that are a little too long grow.
        arguments = {"q": q.astype(self.dtype), "k": k, "v": v, "beta": self._sizes(self.b_proj, x)}
        return arguments | {"g": g, "negative": negative, "e": e, "gamma": gamma}, tails

    def _unit(self, u: jax.Array, num_heads: int) -> jax.Array:
        """Unit vectors of all value heads, in float32 at least."""
        u = u.reshape(*u.shape[:2], num_heads, self.head_dim).astype(accumulator_dtype(self.dtype))
        u = u * jax.lax.rsqrt(jnp.sum(u * u, axis=-1, keepdims=True) + L2NORM_EPSILON)
        return jnp.repeat(u, self.num_v_heads // num_heads, axis=2)

    def _sizes(self, project: nnx.Linear, x: jax.Array, bias: str = "b_bias") -> jax.Array:
        """Step sizes of all value heads."""
        wide = accumulator_dtype(self.dtype)
        b = project(x).astype(wide)
        if self.beta_bias is not None:
            b = b + getattr(self, bias)[...].astype(wide)[None, None]
        return jax.nn.sigmoid(b) * (2.0 if self.allow_neg_eigval else 1.0)

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
        o = self.o_norm(o)
        if self.use_output_gate:
            gate = self.output_gate_up(self.output_gate_down(x))
            o = o * jax.nn.sigmoid(gate.reshape(o.shape))
        return self.o_proj(o.reshape(*o.shape[:2], -1))


class ComplexKimiDeltaAttention(KimiDeltaAttention):
    """:class:`KimiDeltaAttention` with gates in [-1, 1], and the same arguments.

    With a = 2 sigmoid(exp(A_log) f) - 1 the gate has the sign of a and the magnitude
    ``LEAST_GATE + (1 - LEAST_GATE) |a|``. It starts where the other form's does, but below 0 in
    every other channel.
    """

    def _make_gates(self, hidden_size, project, rngs):
        super()._make_gates(hidden_size, project, rngs)
        self.A_log = nnx.Param(jnp.zeros((self.num_v_heads,), jnp.float32))
        alpha = jnp.exp(-jax.nn.softplus(self.dt_bias[...]))
        start = 2 * jnp.arctanh((alpha - LEAST_GATE) / (1 - LEAST_GATE))
        sign = 1.0 - 2.0 * (jnp.arange(start.shape[0]) % 2)
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
        check=check_conv_size,
        idle=idle_conv_size,
    )


register_channel_delta("kimi_delta_attention", KimiDeltaAttention)
register_channel_delta("complex_kimi_delta_attention", ComplexKimiDeltaAttention)
