"""What the layers of the delta rule have in common: q, k and v, step sizes, gated outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deltaproduct_jax.errors import require_one_of
from deltaproduct_jax.layers.heads import HeadMixer, HeadOptions
from deltaproduct_jax.layers.mixer import RecurrentMixer, State
from deltaproduct_jax.layers.projection import Parts
from deltaproduct_jax.layers.short_conv import ACTIVATIONS, segment_runs
from deltaproduct_jax.ops.convolution.dispatch import activated
from deltaproduct_jax.ops.convolution.plain import Form
from deltaproduct_jax.ops.convolution.selection import PLAIN, Choice
from deltaproduct_jax.ops.precision import accumulator_dtype

Activation = Callable[[jax.Array], jax.Array]

QK_ACTIVATIONS = ("silu", "none")


class TokenFactors(NamedTuple):
    """What tokens do to the state of every head.

    Attributes:
        k: ``[B, T, R, H, K]``, before the op makes unit vectors of them.
        v: ``[B, T, R, Hv, V]``, what is written.
        beta: ``[B, T, R, Hv]``, float32 at least.
        g: ``[B, T, Hv]``, log decay, or None without a forget gate.
    """

    k: Float[Array, "B T R H K"]
    v: Float[Array, "B T R Hv V"]
    beta: Float[Array, "B T R Hv"]
    g: Float[Array, "B T Hv"] | None


class DeltaRuleMixer(HeadMixer[State], RecurrentMixer[State]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]`` that corrects what its state holds at a key.

    Args:
        hidden_size: width ``D`` of input and output.
        num_v_heads: heads ``Hv`` of values, gates and step sizes, a multiple of ``num_heads``; None
            for ``num_heads``.
        use_output_gate: gate the normalised output.
        use_short_conv: causal convolution over ``conv_size`` tokens on q, k and v.
        conv_size: taps of the convolution.
        qk_activation: ``"silu"`` or ``"none"`` on q and k; v always has SiLU.
        beta_bias: starting value of a learnt bias before the sigmoid of every step size; None for
            no bias, as published.
        **shared: as in :class:`HeadMixer`. With ``allow_neg_eigval`` step sizes are in (0, 2)
            instead of (0, 1).

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    step_sizes = ("b",)  # what reads them is called b_proj, their bias b_bias

    def __init__(
        self,
        hidden_size: int,
        *,
        num_v_heads: int | None = None,
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        qk_activation: str = "silu",
        beta_bias: float | None = None,
        **shared: Unpack[HeadOptions],
    ):
        require_one_of("qk_activation", qk_activation, QK_ACTIVATIONS)
        if num_v_heads is not None:
            self.num_v_heads = num_v_heads
        self.use_output_gate, self.use_short_conv = use_output_gate, use_short_conv
        self.conv_size, self.qk_activation = conv_size, qk_activation
        super().__init__(hidden_size, **shared)
        if beta_bias is not None:
            for name in self.step_sizes:
                read = getattr(self, f"{name}_proj")
                bias = jnp.full((read.out_features,), beta_bias, read.param_dtype)
                setattr(self, f"{name}_bias", nnx.Param(bias))

    def _activation(self, name: str) -> Activation:
        """That of q, k or v."""
        return ACTIVATIONS[self._activation_name(name)]

    def _activation_name(self, name: str) -> str:
        return "silu" if name == "v" else self.qk_activation

    def _make_convolution(self, make: Parts, name: str, channels: int) -> None:
        """The convolution of q, k or v, if there is one."""
        if self.use_short_conv:
            conv = make.convolve(channels, self.conv_size, self._activation_name(name))
            setattr(self, f"{name}_conv1d", conv)

    def _no_inputs(self, batch_size: int) -> list[jax.Array]:
        """The states of the three convolutions before the first token."""
        if not self.use_short_conv:
            return [jnp.zeros((batch_size, 0, 0), self.dtype)] * 3
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return [conv.init_state(batch_size, self.dtype) for conv in convs]

    def _convolved(
        self,
        read: Callable[[str], jax.Array],
        state: Any,
        segment_ids: jax.Array | None,
        length: jax.Array | None,
        unit_width: int | None = None,
        choice: Choice = PLAIN,
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """q, k and v, activated, and the states of their convolutions after them.

        Args:
            read: what the projection of q, k or v makes of the inputs.
            state: state of the tokens before.
            segment_ids: their segments, or None.
            length: number of leading tokens of each row that count; None when all do.
            unit_width: of q and k, see :class:`ShortConv`.
            choice: what computes them, see :class:`ShortConv`.
        """
        run = segment_runs(segment_ids)
        mixed, tails = [], []
        for name in ("q", "k", "v"):
            u, tail = read(name), getattr(state, f"{name}_conv")
            width = None if name == "v" else unit_width
            if self.use_short_conv:
                convolve = getattr(self, f"{name}_conv1d")
                u, tail = convolve(u, tail, run, length, unit_width=width, choice=choice)
            elif width is not None:
                u = activated(choice, Form(self._activation(name), width), u)
            else:
                u = self._activation(name)(u)
            mixed.append(u)
            tails.append(tail)
        return mixed, tails

    def _sizes(self, b: jax.Array, bias: str = "b_bias") -> jax.Array:
        """Step sizes, of what is read ``[B, T, ...]`` of them."""
        wide = accumulator_dtype(self.dtype)
        b = b.astype(wide)
        if hasattr(self, bias):
            b = b + getattr(self, bias)[...].astype(wide).reshape(b.shape[2:])[None, None]
        return jax.nn.sigmoid(b) * (2.0 if self.allow_neg_eigval else 1.0)
