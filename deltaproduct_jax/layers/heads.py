"""What mixers of heads have in common: arguments, parameters, and a matrix for every head."""

import math
from collections.abc import Callable
from typing import Any, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.initializers import (
    decay_rate_init,
    decay_step_init,
    softplus_inverse,
)
from deltaproduct_jax.layers.mixer import SequenceMixer, State
from deltaproduct_jax.layers.projection import Parts, value_width
from deltaproduct_jax.ops.blocks import rows
from deltaproduct_jax.ops.precision import accumulator_dtype


def check_gate(initial_gate: float | None, layer: type) -> None:
    """Raises ConfigError unless gates of such a layer may start there."""
    least = getattr(layer, "least_gate", None)
    if initial_gate is None:
        return
    if least is None:
        raise ConfigError(
            f"initial_gate={initial_gate!r} does not fit {layer.__name__}, which has no gates that "
            "start where one says; leave it none"
        )
    if not least < initial_gate < 1:
        raise ConfigError(
            f"initial_gate={initial_gate!r} must be above {least:.4g} and below 1, or none"
        )


class DrawnOptions(TypedDict, total=False):
    """Keywords of :class:`DrawnMixer`, which has their defaults and says what they mean."""

    num_heads: Required[int]
    head_dim: Required[int]
    initial_gate: float | None
    norm_eps: float
    initializer: str
    initializer_range: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: Required[nnx.Rngs]


class HeadOptions(DrawnOptions, total=False):
    """Keywords of :class:`HeadMixer`, which has their defaults and says what they mean."""

    expand_v: float
    allow_neg_eigval: bool
    implementation: str | None
    chunk_size: int | None


class DrawnMixer(SequenceMixer[State]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]`` of heads, whose parameters are drawn alike.

    A subclass makes its parameters in :meth:`_make`. One that takes more sets it before it calls
    this constructor, and passes the rest on.

    Args:
        hidden_size: width ``D`` of input and output.
        num_heads: heads ``H``, of queries and keys where there are such.
        head_dim: key width ``K`` of a head.
        initial_gate: what every forget gate keeps of a state in a token before training, where the
            input is zero; below 1 and above the mixer's ``least_gate``. None for the published
            start. Where ``allow_neg_eigval`` makes a gate ``2 alpha - 1``, it is alpha that starts.
        norm_eps: epsilon of the output norm.
        initializer: ``"paper"`` or ``"fla"``, see ``layers/initializers.py``.
        initializer_range: standard deviation of ``"fla"``.
        dtype: dtype of the computation. Gates, norms and the state stay in float32 at least.
        param_dtype: dtype of the parameters; A_log and dt_bias are float32 always.
        rngs: source of the parameter keys.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    # What gates are above, whatever is learnt; None where `_make` does not see to `initial_gate`.
    least_gate: float | None = None

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        initial_gate: float | None = None,
        norm_eps: float = 1e-5,
        initializer: str = "paper",
        initializer_range: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_gate(initial_gate, type(self))
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dtype = jnp.dtype(dtype)
        self._fit()
        drawn = initializer, initializer_range
        self._make(hidden_size, Parts(*drawn, dtype, param_dtype, rngs, norm_eps, initial_gate))

    def _fit(self) -> None:
        """Sets the sizes that follow from others; ConfigError where they do not fit together."""

    def _make(self, D: int, make: Parts) -> None:
        """Makes the parameters, for inputs of width ``D``."""
        raise NotImplementedError


class HeadMixer(DrawnMixer[State]):
    """Such a mixer with a state ``[B, Hv, K, V]``, a matrix for every value head.

    A subclass that groups value heads sets ``num_v_heads`` before it calls this constructor.

    Args:
        hidden_size: width ``D`` of input and output.
        expand_v: value width over key width; ``V = head_dim * expand_v`` must be whole.
        allow_neg_eigval: eigenvalues of a transition in (-1, 1) instead of (0, 1).
        implementation: how the op is computed: ``"recurrent"``, ``"chunked"``, None for the latter.
        chunk_size: tokens in a chunk of the op; None for the op's choice.
        **shared: as in :class:`DrawnMixer`.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    num_v_heads: int

    def __init__(
        self,
        hidden_size: int,
        *,
        expand_v: float = 1.0,
        allow_neg_eigval: bool = True,
        implementation: str | None = None,
        chunk_size: int | None = None,
        **shared: Unpack[DrawnOptions],
    ):
        self.expand_v, self.allow_neg_eigval = expand_v, allow_neg_eigval
        self.implementation, self.chunk_size = implementation, chunk_size
        super().__init__(hidden_size, **shared)

    def _fit(self) -> None:
        if not hasattr(self, "num_v_heads"):
            self.num_v_heads = self.num_heads
        sizes = {"num_v_heads": self.num_v_heads, "expand_v": self.expand_v}
        self.value_dim = value_width(self.num_heads, self.head_dim, **sizes)

    def _make_decay(self, make: Parts, channels: int, **least: float) -> None:
        """``A_log`` of every value head, and ``dt_bias`` of so many channels."""
        A_log = decay_rate_init(make.rngs.params(), (self.num_v_heads,), **least)
        dt_bias = decay_step_init(make.rngs.params(), (channels,))
        if make.initial_gate is not None:
            each = softplus_inverse(self._decay_of(make.initial_gate) / jnp.exp(A_log))
            dt_bias = jnp.repeat(each, channels // self.num_v_heads)
        self.A_log, self.dt_bias = nnx.Param(A_log), nnx.Param(dt_bias)

    def _decay(self, x: jax.Array) -> jax.Array:
        """The log decay of every value head, ``[B, T, Hv]``, of inputs ``[B, T, D]``."""
        wide = accumulator_dtype(self.dtype)
        rate = jnp.exp(self.A_log[...].astype(wide))[None, None]
        a = self.a_proj(x).astype(wide) + self.dt_bias[...].astype(wide)[None, None]
        return -rate * jax.nn.softplus(a)

    def _decay_of(self, gate: float) -> float:
        """``exp(A_log) softplus(...)`` of a gate."""
        return -math.log(gate)

    def _widths(self) -> tuple[int, int]:
        """Channels of the keys and of the values of all heads."""
        return self.num_heads * self.head_dim, self.num_v_heads * self.value_dim

    def _no_matrices(self, batch_size: int) -> jax.Array:
        """The matrices before the first token: all zero."""
        shape = (batch_size, self.num_v_heads, self.head_dim, self.value_dim)
        return jnp.zeros(shape, accumulator_dtype(self.dtype))

    def _options(self, state: Any, segment_ids: jax.Array | None) -> dict[str, Any]:
        """Keywords of the op that every one takes."""
        return {
            "initial_state": state.recurrent,
            "segment_ids": segment_ids,
            "implementation": self.implementation,
            "chunk_size": self.chunk_size,
        }

    def _project_out(
        self,
        o: jax.Array,
        gate: jax.Array | None = None,
        activation: Callable[[jax.Array], jax.Array] = nnx.silu,
        *,
        by_kernel: bool = False,
    ) -> jax.Array:
        """Norm, gate and output projection of ``o [B, T, Hv, V]``.

        ``by_kernel`` is for whole arrays on a GPU, without a gate: `rows.norm_product`.
        """
        if by_kernel:
            kernel = self.o_proj.kernel[...].astype(o.dtype)
            return rows.norm_product(o, self.o_norm.scale[...], kernel, self.o_norm.eps)
        o = self.o_norm(o)
        if gate is not None:
            o = o * activation(gate.reshape(o.shape))
        return self.o_proj(o.reshape(*o.shape[:2], -1))
