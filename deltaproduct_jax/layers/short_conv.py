"""Causal depthwise convolution over a few tokens, with a state for decoding and packed rows."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.layers.checks import check_width, checks_arguments
from deltaproduct_jax.layers.padding import along_rows
from deltaproduct_jax.ops.checks import as_array
from deltaproduct_jax.ops.convolution.dispatch import POINT, short_convolution
from deltaproduct_jax.ops.convolution.plain import Form, beside, identity
from deltaproduct_jax.ops.convolution.selection import PLAIN, Choice
from deltaproduct_jax.ops.packing import starts_of_segments
from deltaproduct_jax.ops.parts import along_rows_of, with_past
from deltaproduct_jax.ops.precision import accumulator_dtype

Activation = Callable[[jax.Array], jax.Array]
# Fields that mean nothing without convolutions.
OF_CONVOLUTIONS = ("conv_size",)
# Modules hold their names: functions of JAX's cannot be pickled, nor could what holds one.
ACTIVATIONS: dict[str, Activation] = {
    "silu": nnx.silu,
    "tanh": jnp.tanh,
    "sigmoid": nnx.sigmoid,
    "none": identity,
}


class ShortConv(nnx.Module):
    """``y[t] = sum_w weight[w] * u[t - conv_size + 1 + w]``, each channel on its own.

    The last tap multiplies the current token. Before the first token of a segment the input counts
    as zero. Products and the sum are taken in float32 at least.

    Args:
        channels: number of channels.
        conv_size: number of taps ``W``, at least 1.
        activation: a name of `ACTIVATIONS`, or a function, applied to the convolution before it is
            rounded to the dtype of the input.
        kernel_init: initialiser of the taps ``[W, channels]``.
        param_dtype: dtype of the taps.
        rngs: source of the parameter key.

    Raises:
        ConfigError: there is no activation of that name.
    """

    @checks_arguments
    def __init__(
        self,
        channels: int,
        conv_size: int = 4,
        *,
        activation: str | Activation,
        kernel_init: nnx.Initializer,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv_size = conv_size
        self.channels = channels
        if isinstance(activation, str):
            require_one_of("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.weight = nnx.Param(kernel_init(rngs.params(), (conv_size, channels), param_dtype))

    def init_state(self, batch_size: int, dtype: DTypeLike) -> Float[Array, "B tail channels"]:
        """The state before the first token: ``conv_size - 1`` zero inputs."""
        return jnp.zeros((batch_size, self.conv_size - 1, self.channels), dtype)

    def __call__(
        self,
        u: Float[Array, "B T *channels"],
        state: Float[Array, "B tail all_channels"],
        run: Int[Array, "B T"] | None = None,
        length: Int[Array, " B"] | None = None,
        *,
        unit_width: int | None = None,
        choice: Choice = PLAIN,
    ) -> tuple[Float[Array, "B T *channels"], Float[Array, "B tail all_channels"]]:
        """Convolves ``u`` and returns the state for what follows.

        Args:
            u: inputs; the channels may lie along several axes.
            state: the ``conv_size - 1`` inputs before ``u``, oldest first, channels along one axis.
            run: number of the segment that each token belongs to, 0 for the row's first, counted
                upwards; None when every row is one segment. ``state`` belongs to run 0.
            length: number of leading tokens of each row that count; None when all do.
            unit_width: divide every so many channels by their length; None: do not.
            choice: what computes it, see ``ops/convolution``.

        Raises:
            ValueError: ``u`` or ``state`` has another shape.

        Returns:
            The convolution, in the dtype of ``u``, and the last ``conv_size - 1`` inputs of the
            row's last segment, zero where that segment is shorter.
        """
        if math.prod(jnp.shape(u)[2:]) != self.channels:
            check_width("u", u, self.channels)
        if u.ndim < 3:
            raise ValueError(f"u must have dimensions [B, T, *channels], got shape {u.shape}")
        B, _, *channels = u.shape
        tail = self.conv_size - 1
        state = as_array("state", state)
        if state.shape != (B, tail, self.channels):  # of which a reshape would take some
            raise ValueError(
                f"state must have shape {(B, tail, self.channels)}, as init_state makes it, got "
                f"{state.shape}"
            )
        before = state.astype(u.dtype).reshape(B, tail, *channels)
        weight = self.weight[...].astype(accumulator_dtype(u.dtype)).reshape(-1, *channels)
        past = None if run is None else along_rows_of(run, jnp.zeros((B, tail), run.dtype))
        name = self.activation
        form = Form(ACTIVATIONS[name] if isinstance(name, str) else name, unit_width)
        y = with_past(
            lambda new, old, taps: short_convolution(
                choice, form, new[0], old[0], taps, new[1], old[1]
            ),
            (u, run),
            (before, past),
            weight,
            on_each_device=choice.may_run_kernel,
            check_vma=not choice.is_interpreted,
        )
        y = checkpoint_name(y, POINT) if choice.may_run_kernel else y

        after = last_inputs(before, u, past, run, length)
        return y, after.reshape(B, tail, self.channels)


def last_inputs(
    before: jax.Array,
    u: jax.Array,
    past: jax.Array | None,
    run: jax.Array | None,
    length: jax.Array | None,
) -> jax.Array:
    """The state after ``u``, of the shape of ``before``; arguments as of a convolution."""
    T, tail = u.shape[1], before.shape[1]
    padded = jnp.concatenate([before, u], axis=1)
    if run is not None:
        run = jnp.concatenate([past, run], axis=1)
    # Of ``padded``, the inputs number length .. length + tail - 1 are the last ``tail`` ones.
    if length is None:
        after, here = padded[:, T:], None if run is None else run[:, T:]
    else:
        last = length[:, None] + jnp.arange(tail)[None]
        after = along_rows(padded, last)
        here = None if run is None else along_rows(run, last)
    if here is not None:
        after = jnp.where(beside(here == here[:, -1:], after), after, 0)
    return after


def segment_runs(segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"] | None:
    """Numbers the segments of each row 0, 1, 2, ...; an id that returns is a new segment."""
    if segment_ids is None:
        return None
    return jnp.cumsum(starts_of_segments(segment_ids), axis=1, dtype=jnp.int32)


def check_convolutions(config: Any) -> None:
    """ConfigError if something is said of convolutions that are not used."""
    for name in OF_CONVOLUTIONS:
        value = getattr(config, name, None)
        if value is not None and not config.use_short_conv:
            raise ConfigError(
                f"{name}={value} means nothing without use_short_conv, got "
                f"use_short_conv={config.use_short_conv}; set that too, or leave {name} none"
            )


def idle_of_convolutions(values: Mapping[str, Any]) -> list[str]:
    """The fields that say something of convolutions that are not used."""
    used = values.get("use_short_conv")
    return [name for name in OF_CONVOLUTIONS if name in values and not used]
