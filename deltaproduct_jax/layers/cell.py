"""The (Gated) DeltaProduct layer as a cell of Flax's recurrent family."""

import math
from collections.abc import Sequence
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.checks import as_like, check_width, checks_arguments, refuse_swapped
from deltaproduct_jax.layers.delta_product import DeltaProductState, GatedDeltaProduct
from deltaproduct_jax.ops.checks import check_size
from deltaproduct_jax.settings import shown


class DeltaProductOptions(TypedDict, total=False):
    """Keywords of :class:`GatedDeltaProduct`, which has their defaults and says what they mean."""

    num_heads: int
    head_dim: int
    num_v_heads: int | None
    expand_v: float
    num_householder: int
    allow_neg_eigval: bool
    use_forget_gate: bool
    use_output_gate: bool
    use_short_conv: bool
    conv_size: int
    qk_activation: str
    beta_bias: float | None
    initial_gate: float | None
    norm_eps: float
    initializer: str
    initializer_range: float
    conv_implementation: str | None
    implementation: str | None
    chunk_size: int | None
    dtype: DTypeLike
    param_dtype: DTypeLike


class DeltaProductCell(nnx.RNNCellBase):
    """:class:`GatedDeltaProduct` as a cell of Flax's recurrent family, for ``nnx.RNN`` and others.

    ``cell(carry, x)`` takes one token and returns ``(carry, y)``; any leading axes are batch axes.
    Whole sequences are far faster through the layer itself: ``cell.mixer(x)`` computes the same
    outputs in parallel.

    Args:
        in_features: width ``D`` of inputs and outputs.
        rngs: source of the parameter keys.
        **options: any other keyword of :class:`GatedDeltaProduct`, with its default there.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    @checks_arguments
    def __init__(self, in_features: int, *, rngs: nnx.Rngs, **options: Unpack[DeltaProductOptions]):
        self.in_features = in_features
        self.mixer = GatedDeltaProduct(in_features, rngs=rngs, **options)

    def initialize_carry(
        self,
        input_shape: Sequence[int],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: nnx.Initializer | None = None,
    ) -> DeltaProductState:
        """The carry before the first token, for inputs of ``input_shape`` (``[..., D]``).

        Args:
            input_shape: shape of one token's input, batch axes included.
            rngs: needed with ``carry_init`` only; of an ``Rngs`` the stream ``carry`` is used.
            carry_init: initialiser of the recurrent state; None for zeros.

        Raises:
            ConfigError: the shape is of inputs of another width, or ``rngs`` is missing.
        """
        is_shape = isinstance(input_shape, Sequence) and not isinstance(input_shape, str)
        if not is_shape or not input_shape or input_shape[-1] != self.in_features:
            raise ConfigError(
                f"input_shape={shown(input_shape)} must be a shape that ends in "
                f"in_features={self.in_features}"
            )
        for size in input_shape[:-1]:
            check_size("input_shape", size, 0)
        batch = tuple(input_shape[:-1])
        state = self.mixer.init_state(1)
        state = jax.tree.map(lambda a: jnp.broadcast_to(a[0], batch + a.shape[1:]), state)
        if carry_init is not None:
            if rngs is None:
                raise ConfigError("carry_init draws a state and needs rngs, got rngs=None")
            key = rngs.carry() if isinstance(rngs, nnx.Rngs) else rngs()
            drawn = carry_init(key, state.recurrent.shape, state.recurrent.dtype)
            state = state._replace(recurrent=drawn)
        return state

    def __call__(
        self, carry: DeltaProductState, inputs: Float[Array, "*batch D"]
    ) -> tuple[DeltaProductState, Float[Array, "*batch D"]]:
        """One token."""
        refuse_swapped(carry, inputs)
        check_width("inputs", inputs, self.in_features)
        batch = inputs.shape[:-1]
        carry = as_like("carry", carry, jax.eval_shape(lambda: self.initialize_carry(inputs.shape)))
        rows = math.prod(batch)  # -1 is unknown where a carry has size 0, as without convolutions
        flat = jax.tree.map(lambda a: a.reshape(rows, *a.shape[len(batch) :]), carry)
        y, flat = self.mixer.step(flat, inputs.reshape(rows, inputs.shape[-1]))
        carry = jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), flat)
        return carry, y.reshape(*batch, self.in_features)

    @property
    def num_feature_axes(self) -> int:
        """An input has one feature axis."""
        return 1
