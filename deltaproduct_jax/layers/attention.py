"""Causal softmax attention with rotary positions: the Transformer's mixer.

    o_t = sum over s <= t of softmax(rope(q_t) . rope(k_s) / sqrt(K)) v_s

With a window of w tokens only those with t - s < w are seen.

Sources: Vaswani et al. (2017); rotary positions of Su et al. (2021), on the two halves of a head;
grouped keys and values of Ainslie et al. (2023).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.mixer import SequenceMixer
from deltaproduct_jax.layers.padding import along_rows, without_padding
from deltaproduct_jax.layers.projection import Parts, value_width
from deltaproduct_jax.layers.registry import register_mixer
from deltaproduct_jax.layers.short_conv import segment_runs
from deltaproduct_jax.layers.softmax import Places, attend
from deltaproduct_jax.ops.containment import contained, only_finite
from deltaproduct_jax.ops.debug import check_range, nan_if
from deltaproduct_jax.ops.exported import exported
from deltaproduct_jax.ops.packing import starts_of_segments
from deltaproduct_jax.ops.parts import along_rows_of, on_each_row
from deltaproduct_jax.ops.precision import accumulator_dtype

ROPE_THETA = 10_000.0


@exported
class AttentionState(NamedTuple):
    """Keys and values of the tokens so far, of the last segment only.

    Attributes:
        k: ``[B, max_length, Hk, K]``, rotated; what lies behind ``length`` is zero. ``Hk`` is the
            number of key and value heads, which divides ``H``.
        v: ``[B, max_length, Hk, V]``.
        length: ``[B]``, int32, how many tokens there are. It may exceed ``max_length``; the state
            has then lost some, and whatever is computed from it is NaN.
    """

    k: Float[Array, "B max_length Hk K"]
    v: Float[Array, "B max_length Hk V"]
    length: Int[Array, " B"]


class SoftmaxAttention(SequenceMixer[AttentionState]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]``; time and memory grow with ``T`` squared.

    Args:
        hidden_size: width ``D`` of input and output.
        num_heads: heads ``H``.
        head_dim: width ``K`` of queries and keys, even.
        expand_v: value width over key width; ``V = head_dim * expand_v`` must be whole.
        max_length: tokens that the state for decoding holds. Sequences read at once may be longer,
            but then nothing can follow them: a step beyond it is an error, and NaN under jit.
        num_kv_heads: heads of keys and values, each shared by a group of those of queries; None for
            ``num_heads``.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        window_size: tokens that one sees, itself among them; None for all before it.
        rope_theta: base of the rotary positions.
        initializer: ``"paper"`` or ``"fla"``, see ``layers/initializers.py``.
        initializer_range: standard deviation of ``"fla"``.
        dtype: dtype of the computation; the softmax is taken in float32 at least.
        param_dtype: dtype of the parameters.
        rngs: source of the parameter keys.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        expand_v: float = 1.0,
        max_length: int = 2048,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        window_size: int | None = None,
        rope_theta: float = ROPE_THETA,
        initializer: str = "paper",
        initializer_range: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        value_dim = value_width(num_heads, head_dim, expand_v=expand_v)
        check_heads(num_heads, head_dim, num_kv_heads)
        self.num_heads, self.head_dim, self.value_dim = num_heads, head_dim, value_dim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.window_size, self.rope_theta = window_size, rope_theta
        self.max_length, self.dtype = max_length, jnp.dtype(dtype)
        project = Parts(initializer, initializer_range, dtype, param_dtype, rngs).project
        self.q_proj = project(hidden_size, num_heads * head_dim, qkv_bias)
        self.k_proj = project(hidden_size, self.num_kv_heads * head_dim, qkv_bias)
        self.v_proj = project(hidden_size, self.num_kv_heads * value_dim, qkv_bias)
        self.o_proj = project(num_heads * value_dim, hidden_size)

    def init_state(self, batch_size: int) -> AttentionState:
        """The state before the first token: no keys, room for ``max_length``."""
        shape = (batch_size, self.max_length, self.num_kv_heads)
        return AttentionState(
            jnp.zeros((*shape, self.head_dim), self.dtype),
            jnp.zeros((*shape, self.value_dim), self.dtype),
            jnp.zeros((batch_size,), jnp.int32),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        state: AttentionState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        num_segments: int | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        """Mixes whole sequences; see :class:`RecurrentMixer` for the arguments."""
        if num_segments is not None:
            return self._by_segment(x, state, segment_ids, mask, num_segments)
        if state is not None:
            self._check_room(state.length, self.max_length)
        if 0 in x.shape:
            return x, self.init_state(x.shape[0]) if state is None else state
        state = along_rows_of(x, state)
        return without_padding(self._whole, x, state, segment_ids, mask)

    def step(
        self, state: AttentionState, x: Float[Array, "B D"]
    ) -> tuple[Float[Array, "B D"], AttentionState]:
        """One token for every row: returns the outputs and the state after it."""
        self._check_room(state.length, self.max_length - 1)
        if 0 in x.shape:
            return x.astype(self.dtype), state
        state = along_rows_of(x, state)
        q, k, v = self._inputs(x[:, None], state.length[:, None])
        state = on_each_row(_append, state, k[:, 0], v[:, 0])
        held = jnp.arange(self.max_length, dtype=jnp.int32)[None]
        held = along_rows_of(x, jnp.broadcast_to(held, state.k.shape[:2]))
        last = state.length[:, None] - 1
        places = Places(jnp.zeros_like(last), last, jnp.zeros_like(held), held)
        k, v = self._grouped(state.k), self._grouped(state.v)
        o = attend(q, k, v, places, window=self.window_size)
        return self._output(o, state.length)[:, 0], state

    def _whole(self, x, state, segment_ids, length):
        B, T, _ = x.shape
        before = jnp.zeros((B,), jnp.int32) if state is None else state.length
        tokens = jnp.arange(T, dtype=jnp.int32)[None]
        if segment_ids is None:  # sums along a row would be exchanged where a mesh cuts it
            run = start = jnp.zeros((B, T), jnp.int32)
        else:
            run = segment_runs(segment_ids)
            new = jnp.concatenate([run[:, :1] > 0, run[:, 1:] > run[:, :-1]], axis=1)
            start = jax.lax.cummax(jnp.where(new, tokens, 0), axis=1)
        goes_on = jnp.where(run == 0, before[:, None], 0)  # tokens of the segment before x
        position = tokens - start + goes_on
        q, k, v = self._inputs(x, position)

        places = Places(run, position, run, position)
        if state is not None:
            old = jnp.broadcast_to(jnp.arange(self.max_length, dtype=jnp.int32), state.k.shape[:2])
            run_of_old = jnp.where(old < before[:, None], 0, -1)
            places = places._replace(
                run_of_keys=jnp.concatenate([run_of_old, run], axis=1),
                position_of_keys=jnp.concatenate([old, position], axis=1),
            )
        is_whole = state is None and segment_ids is None
        # Whoever looks for what is not finite counts heads of the past as those of the outputs.
        held = () if state is None else (self._grouped(state.k), self._grouped(state.v))
        past = tuple(jnp.swapaxes(x, 1, 2) for x in held)

        def mix(tokens, past):
            q, k, v = only_finite(tokens)
            k, v = self._grouped(k), self._grouped(v)
            if past:
                k, v = (
                    jnp.concatenate([jnp.swapaxes(old, 1, 2), new], axis=1)
                    for old, new in zip(past, (k, v), strict=True)
                )
            return attend(q, k, v, places, whole=is_whole, window=self.window_size), ()

        resets = None if segment_ids is None else starts_of_segments(segment_ids)
        o, _ = contained(mix, (q, k, v), past, resets, head_axes=(2, 2, 2))
        if state is not None:
            k = jnp.concatenate([state.k, k], axis=1)
            v = jnp.concatenate([state.v, v], axis=1)

        # The last segment, what the state held of it included, from the front of the new state.
        count = jnp.full((B,), T, jnp.int32) if length is None else length.astype(jnp.int32)
        held = goes_on[:, -1:]
        place = jnp.arange(self.max_length, dtype=jnp.int32)[None]
        source = place - held + start[:, -1:] + (k.shape[1] - T)
        source = jnp.clip(jnp.where(place < held, place, source), 0, k.shape[1] - 1)
        total = goes_on[:, -1] + count - start[:, -1]
        kept = place < total[:, None]

        def gather(x):
            return jnp.where(kept[..., None, None], along_rows(x, source), 0)

        return self._output(o, before), AttentionState(gather(k), gather(v), total)

    def _check_room(self, length: jax.Array, most: int) -> None:
        """ValueError, where they are known, if the states of rows hold more than ``most`` tokens.

        Under jit they are not, and the outputs of such rows are NaN; ``ops.checked`` finds them.
        """
        check_range("state.length", length, 0, most)
        if not isinstance(length, jax.core.Tracer) and np.any(np.asarray(length) > most):
            raise ValueError(
                f"state.length={np.asarray(length).tolist()} leaves no room for what follows in "
                f"max_length={self.max_length}; make the layer with a larger max_length"
            )

    def _inputs(self, x: jax.Array, position: jax.Array) -> tuple[jax.Array, ...]:
        """q ``[B, T, H, K]``, k and v ``[B, T, Hk, *]``; q and k turned to ``position [B, T]``."""
        heads = lambda u, count: u.reshape(*u.shape[:2], count, -1)
        q = heads(self.q_proj(x), self.num_heads)
        k, v = (heads(project(x), self.num_kv_heads) for project in (self.k_proj, self.v_proj))
        turned = (rotate(u, position, self.rope_theta) for u in (q, k))
        return (*turned, v)

    def _grouped(self, x: jax.Array) -> jax.Array:
        """Keys or values ``[B, S, Hk, *]``, one a head of the queries: ``[B, S, H, *]``."""
        groups = self.num_heads // self.num_kv_heads
        return x if groups == 1 else jnp.repeat(x, groups, axis=2)

    def _output(self, o: jax.Array, length: jax.Array) -> jax.Array:
        """Output projection; NaN in rows whose state had no room for ``length`` tokens."""
        y = self.o_proj(o.reshape(*o.shape[:2], -1))
        return nan_if((length > self.max_length)[:, None, None], y)


def check_heads(num_heads: int, head_dim: int, num_kv_heads: int | None) -> None:
    """ConfigError unless channels can be rotated in pairs, and heads fall into groups."""
    if head_dim % 2:
        raise ConfigError(f"head_dim={head_dim} must be even: positions rotate pairs")
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ConfigError(f"num_kv_heads={num_kv_heads} must divide the {num_heads} heads")


def _append(state: AttentionState, k: jax.Array, v: jax.Array) -> AttentionState:
    """The state with one token more, where there is room."""
    rows = jnp.arange(k.shape[0])
    return AttentionState(
        state.k.at[rows, state.length].set(k, mode="drop"),
        state.v.at[rows, state.length].set(v, mode="drop"),
        state.length + 1,
    )


def rotate(
    x: Float[Array, "B T H K"], position: Int[Array, "B T"], theta: float = ROPE_THETA
) -> Float[Array, "B T H K"]:
    """Rotary positions: channels c and c + K/2 turn by ``position * theta**(-2 c / K)``."""
    wide = accumulator_dtype(x.dtype)
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle = position.astype(wide)[..., None, None] * frequency[None, None, None]
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _check(config: Any) -> None:
    """ConfigError for a configuration whose attention cannot be built."""
    sizes = config.attention_sizes
    check_heads(sizes["num_heads"], sizes["head_dim"], config.num_kv_heads)


register_mixer("transformer", SoftmaxAttention, state=AttentionState, check=_check)
