"""The time mixing of RWKV-7 (Peng et al., 2025): transitions diagonal plus rank one.

Per token, each of r, w, k, v, a, g reads its own blend of x and the token before it:

    w = exp(-e^(-1/2) sigmoid(lora_w)),  a = sigmoid(lora_a),  kk = l2norm(k * k_k)
    k' = k * (1 + (a - 1) * k_a),  v' = v + (v_first - v) * sigmoid(lora_v)
    S <- (diag(w) - (a * kk) kk^T) S + k' v'^T,  o = S^T r
    y = ((headnorm(o) + (sum of r * r_k * k') v') * lora_g) W_o

v_first is the value of the model's first block; there, v' is v.
"""

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from deltaproduct_jax.layers.checks import checks_sequences
from deltaproduct_jax.layers.heads import HeadMixer, HeadOptions
from deltaproduct_jax.layers.initializers import log_sigmoid_inverse
from deltaproduct_jax.layers.padding import along_rows, compact, only_counted, without_padding
from deltaproduct_jax.layers.projection import over_tokens
from deltaproduct_jax.layers.registry import register_mixer
from deltaproduct_jax.layers.short_conv import ACTIVATIONS, segment_runs
from deltaproduct_jax.ops.baselines import diagonal_plus_low_rank, diagonal_plus_low_rank_step
from deltaproduct_jax.ops.baselines.checks import IMPLEMENTATIONS
from deltaproduct_jax.ops.checks import as_array, check_shape
from deltaproduct_jax.ops.exported import exported
from deltaproduct_jax.ops.linear import scaled, unit_vectors
from deltaproduct_jax.ops.parts import along_rows_of
from deltaproduct_jax.ops.precision import accumulator_dtype

# Blends of x and the token before it: channel c of D starts at weight 1 - (c / D)**power.
_SHIFT_POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
_L2_EPS = 1e-12
# Log of the strongest decay.
DECAY_RATE = -math.exp(-0.5)


@exported
class RWKV7State(NamedTuple):
    """What a layer remembers of the tokens so far.

    Attributes:
        recurrent: ``[B, H, K, V]``, in float32 at least.
        last: ``[B, D]``, the last input.
    """

    recurrent: Float[Array, "B H K V"]
    last: Float[Array, "B D"]


def _orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    # No platform factorises matrices of bfloat16.
    return nnx.initializers.orthogonal(0.1)(key, shape, accumulator_dtype(dtype)).astype(dtype)


class LoRA(nnx.Module):
    """``activation(x W_1) W_2 + bias`` of low rank; W_1 starts at 0, as published."""

    def __init__(
        self,
        in_features: int,
        rank: int,
        out_features: int,
        *,
        activation: str,
        bias: jax.Array | None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        shared = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared |= {"dot_general": over_tokens}
        zeros = nnx.initializers.zeros
        self.activation = activation
        self.down = nnx.Linear(in_features, rank, kernel_init=zeros, **shared)
        self.up = nnx.Linear(rank, out_features, kernel_init=_orthogonal, **shared)
        self.bias = None if bias is None else nnx.Param(bias.astype(param_dtype))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T out"]:
        """Applies the map to every token."""
        y = self.up(ACTIVATIONS[self.activation](self.down(x)))
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)[None, None]


class RWKV7(HeadMixer[RWKV7State]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]``.

    Args:
        hidden_size: width ``D`` of input and output.
        value_residual: blend values with those of the model's first block; all blocks but the
            first do.
        **shared: as in :class:`HeadMixer`. ``allow_neg_eigval`` doubles the rank-one part. The
            output norm's epsilon is ``head_dim`` times ``norm_eps``, as published. The initialiser
            is that of full-rank projections. ``initial_gate`` is that of w.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    implementations, least_gate = IMPLEMENTATIONS, math.exp(DECAY_RATE)

    def __init__(
        self, hidden_size: int, *, value_residual: bool = False, **shared: Unpack[HeadOptions]
    ):
        self.value_residual = value_residual
        super().__init__(hidden_size, **shared)

    def _make(self, D, make):
        keys, values = self._widths()
        param_dtype = make.param_dtype
        place = jnp.arange(D) / D
        for name, power in _SHIFT_POWERS.items():
            setattr(self, f"x_{name}", nnx.Param((1 - place**power).astype(param_dtype)))
        self.r_proj = make.project(D, keys)
        self.k_proj = make.project(D, keys)
        self.v_proj = make.project(D, values)
        self.o_proj = make.project(values, D)

        def lora(out_features, activation, factor, power, bias, dtype):
            rank = max(32, 32 * round(factor * D**power / 32))
            kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": make.rngs}
            return LoRA(D, rank, out_features, activation=activation, bias=bias, **kinds)

        wide = accumulator_dtype(self.dtype)
        decay = -6.5 + 5 * (jnp.arange(keys) / max(keys - 1, 1)) ** 0.85
        if make.initial_gate is not None:
            decay = jnp.full((keys,), math.log(make.initial_gate) / DECAY_RATE)
            decay = log_sigmoid_inverse(jnp.log(decay))
        self.w_lora = lora(keys, "tanh", 1.8, 0.5, decay, wide)
        self.a_lora = lora(keys, "none", 1.8, 0.5, jnp.zeros(keys), wide)
        self.g_lora = lora(values, "sigmoid", 0.6, 0.8, None, self.dtype)
        if self.value_residual:
            self.v_lora = lora(values, "none", 1.3, 0.5, jnp.ones(values), wide)
        H, K = self.num_heads, self.head_dim
        per_key = lambda value: nnx.Param(jnp.full((H, K), value, param_dtype))
        self.k_k, self.k_a, self.r_k = per_key(0.85), per_key(1.0), per_key(0.0)
        self.o_norm = make.head_norm(H, self.value_dim, eps=K * make.norm_eps, use_bias=True)

    def init_state(self, batch_size: int) -> RWKV7State:
        """The state before the first token: all zero."""
        last = jnp.zeros((batch_size, self.x_r.shape[0]), self.dtype)
        return RWKV7State(self._no_matrices(batch_size), last)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        state: RWKV7State | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        v_first: Float[Array, "B T H V"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RWKV7State]:
        """Mixes whole sequences; see :class:`RecurrentMixer` for the other arguments.

        Args:
            x: inputs.
            state: state of the tokens before.
            segment_ids: sequence that each token belongs to.
            mask: False at padding.
            v_first: what :meth:`values` of the model's first block returned for the same
                ``segment_ids`` and ``mask``; needed with ``value_residual``.
        """
        given = state is not None
        state = state if given else self.init_state(x.shape[0])
        x, v_first = x.astype(self.dtype), self._check_v_first(v_first, x.shape[:2])
        if 0 in x.shape:
            return x, state
        state = along_rows_of(x, state)

        def mix(x, state, segment_ids, length):
            shifted, last = shift(x, state.last, segment_ids, length)
            (r, k, v, kk, b, g), gate = self._inputs(x, shifted, v_first)
            o, recurrent = diagonal_plus_low_rank(
                r,
                only_counted(k, length),
                v,
                kk,
                only_counted(b, length),
                only_counted(g, length),
                scale=1.0,
                **self._options(state, segment_ids),
            )
            return self._output(o, r, k, v, gate), RWKV7State(recurrent, last)

        return without_padding(mix, x, state, segment_ids, mask, check_state=given)

    def step(
        self,
        state: RWKV7State,
        x: Float[Array, "B D"],
        *,
        v_first: Float[Array, "B 1 H V"] | None = None,
    ) -> tuple[Float[Array, "B D"], RWKV7State]:
        """One token for every row: returns the outputs and the state after it."""
        x = x[:, None].astype(self.dtype)
        v_first = self._check_v_first(v_first, x.shape[:2])
        if 0 in x.shape:
            return x[:, 0], state
        state = along_rows_of(x, state)
        shifted, last = shift(x, state.last, None, None)
        inputs, gate = self._inputs(x, shifted, v_first)
        r, k, v, kk, b, g = (a[:, 0] for a in inputs)
        o, recurrent = diagonal_plus_low_rank_step(state.recurrent, r, k, v, kk, b, g, scale=1.0)
        y = self._output(o[:, None], *inputs[:3], gate)
        return y[:, 0], RWKV7State(recurrent, last)

    @checks_sequences
    def values(
        self,
        x: Float[Array, "B T D"],
        *,
        state: RWKV7State | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T H V"]:
        """The values of these inputs, for the blocks after this one; padding stands behind."""
        last = self.init_state(x.shape[0]).last if state is None else state.last
        last = along_rows_of(x, last)
        length = None
        if mask is not None:
            x, segment_ids, length = compact(x, segment_ids, mask)
        x = x.astype(self.dtype)
        return self._values(x, shift(x, last, segment_ids, length)[0])

    def for_later_blocks(self, x: Float[Array, "B T D"], **read: Any) -> dict[str, Any]:
        """See :class:`SequenceMixer`: the first block's values, which later ones blend in."""
        return {"v_first": self.values(x, **read)}

    def _check_v_first(self, v_first: Any, rows: tuple[int, ...]) -> jax.Array | None:
        """``v_first`` as a JAX array; ValueError unless it is there and fits, where it is used."""
        if not self.value_residual:
            return None
        if v_first is None:
            raise ValueError(
                "v_first must be what values() of the model's first block returned, since "
                "value_residual=True, got None"
            )
        v_first = as_array("v_first", v_first)
        sizes = dict(zip(("B", "T"), rows, strict=True))
        sizes |= {"H": self.num_heads, "V": self.value_dim}
        check_shape("v_first", v_first.shape, ("B", "T", "H", "V"), sizes)
        return v_first

    def _blend(self, name: str, x: jax.Array, shifted: jax.Array) -> jax.Array:
        return x + (shifted - x) * getattr(self, f"x_{name}")[...].astype(x.dtype)[None, None]

    def _values(self, x: jax.Array, shifted: jax.Array) -> jax.Array:
        v = self.v_proj(self._blend("v", x, shifted))
        return v.reshape(*v.shape[:2], self.num_heads, self.value_dim)

    def _inputs(self, x: jax.Array, shifted: jax.Array, v_first: jax.Array | None):
        """r, k, v, kk, b and g of the op, and the output gate."""
        wide = accumulator_dtype(self.dtype)
        heads = lambda u: u.reshape(*u.shape[:2], self.num_heads, -1)
        per_key = lambda p: p[...].astype(wide)[None, None]
        blend = lambda name: self._blend(name, x, shifted)
        r, v = heads(self.r_proj(blend("r"))), self._values(x, shifted)
        k = heads(self.k_proj(blend("k"))).astype(wide)
        a = heads(jax.nn.sigmoid(self.a_lora(blend("a").astype(wide))))
        g = DECAY_RATE * heads(jax.nn.sigmoid(self.w_lora(blend("w").astype(wide))))
        if self.value_residual:
            mixing = heads(jax.nn.sigmoid(self.v_lora(blend("v").astype(wide))))
            v = v + (v_first - v) * mixing.astype(v.dtype)
        kk = k * per_key(self.k_k)
        kk = unit_vectors(kk, _L2_EPS)
        b = -(2.0 if self.allow_neg_eigval else 1.0) * a * kk
        k = k * (1 + (a - 1) * per_key(self.k_a))
        narrow = lambda u: u.astype(self.dtype)
        return (r, narrow(k), v, narrow(kk), narrow(b), g), self.g_lora(blend("g"))

    def _output(self, o, r, k, v, gate) -> jax.Array:
        r_k = self.r_k[...].astype(self.dtype)[None, None]
        o = self.o_norm(o) + scaled(v, jnp.sum(r * r_k * k, axis=-1))
        return self.o_proj(o.reshape(gate.shape) * gate)


def shift(
    x: Float[Array, "B T D"],
    last: Float[Array, "B D"],
    segment_ids: Int[Array, "B T"] | None,
    length: Int[Array, " B"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """The token before each one, 0 at the start of a later segment, and the last that counts.

    Args:
        x: inputs.
        last: the input before them, of the row's first segment.
        segment_ids: sequence that each token belongs to; None when every row is one.
        length: number of leading tokens of each row that count; None when all do.
    """
    everything = jnp.concatenate([last[:, None].astype(x.dtype), x], axis=1)
    before = everything[:, :-1]
    if segment_ids is not None:
        run = segment_runs(segment_ids)
        first = jnp.concatenate([run[:, :1] > 0, run[:, 1:] > run[:, :-1]], axis=1)
        before = jnp.where(first[..., None], 0, before)
    if length is None:
        return before, everything[:, -1]
    return before, along_rows(everything, length[:, None])[:, 0]


register_mixer(
    "rwkv7",
    RWKV7,
    state=RWKV7State,
    by_block=lambda block: {"value_residual": block > 0},
)
