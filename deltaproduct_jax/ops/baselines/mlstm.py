"""The matrix memory of xLSTM (Beck et al., 2024): exponential input gate, normaliser, stabiliser.

    m_t = max(log f_t + m_{t-1}, i_t)
    f'_t = exp(log f_t + m_{t-1} - m_t),   i'_t = exp(i_t - m_t),          k_t = key / sqrt(K)
    S_t = f'_t S_{t-1} + i'_t k_t v_t^T,   n_t = f'_t n_{t-1} + i'_t k_t
    o_t = S_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + 1e-6)

f' and i' are at most 1, and the m that they need do not depend on q, k or v: a scan of log depth
finds them all, and what is left is gated linear attention with one more value channel, the
normaliser's. There is no extended range: with negative gates the normaliser could vanish.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from deltaproduct_jax.ops.baselines import chunks
from deltaproduct_jax.ops.baselines.checks import check_arrays, check_options, fields_of
from deltaproduct_jax.ops.baselines.gated_linear_attention import attend_in_chunks
from deltaproduct_jax.ops.containment import contained, only_finite
from deltaproduct_jax.ops.decays import forgets
from deltaproduct_jax.ops.exported import exported
from deltaproduct_jax.ops.parts import on_each_part
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype

_EPS = 1e-6
_CLOSED = -1e30


@exported
class MLSTMState(NamedTuple):
    """State of every head, in float32 at least.

    Attributes:
        memory: S, ``[B, H, K, V]``, divided by exp(m).
        normalizer: n, ``[B, H, K]``, divided by exp(m).
        stabilizer: m, ``[B, H]``.
    """

    memory: Float[Array, "B H K V"]
    normalizer: Float[Array, "B H K"]
    stabilizer: Float[Array, "B H"]


def mlstm_init(B: int, H: int, K: int, V: int, dtype: jax.typing.DTypeLike) -> MLSTMState:
    """The state before the first token of inputs of ``dtype``: all zero."""
    wide = accumulator_dtype(dtype)
    shapes = ((B, H, K, V), (B, H, K), (B, H))
    return MLSTMState(*(jnp.zeros(shape, wide) for shape in shapes))


def mlstm(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    i: Float[Array, "B T H"],
    log_f: Float[Array, "B T H"],
    *,
    initial_state: MLSTMState | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """mLSTM over whole sequences.

    Args:
        q: queries.
        k: keys; the op divides them by ``sqrt(K)``.
        v: values.
        i: log of the input gate, of any size.
        log_f: log of the forget gate, at most 0.
        initial_state: state before the first token; None for an empty one. It continues each row's
            first segment.
        segment_ids, implementation, chunk_size: as :func:`gated_linear_attention` takes them.

    Returns:
        ``(o, final_state)``, in the dtype of ``v``, and in float32 at least.

    Raises:
        ValueError: naming the argument, what it got and what it may be.
    """
    _check(q, k, v, i, log_f, initial_state, "initial_state", segment_ids)
    options = check_options(implementation, chunk_size, q.shape[1])
    arrays = {"q": q, "k": k, "v": v, "i": i, "log_f": log_f}
    if initial_state is not None:
        arrays |= initial_state._asdict()
    of_state = MLSTMState(("B", "H", "K", "V"), ("B", "H", "K"), ("B", "H"))
    keys, gate = ("B", "T", "H", "K"), ("B", "T", "H")
    layouts = {"q": keys, "k": keys, "v": keys, "i": gate, "log_f": gate}
    return on_each_part(
        functools.partial(_run, **options),
        arrays | {"segment_ids": segment_ids},
        layouts | of_state._asdict() | {"segment_ids": ("B", "T")},
        (keys, of_state),
    )


def _run(arrays, *, implementation, chunk_size):
    q, k, v, i, log_f, *of_state, segment_ids = arrays.values()
    B, _, H, K = q.shape
    wide = accumulator_dtype(q.dtype)
    empty = mlstm_init(B, H, K, v.shape[-1], q.dtype)
    state = MLSTMState(*of_state) if of_state else empty
    if 0 in v.shape:
        return v, state
    # An input gate of exp(-inf) writes nothing: so does this, and differences of it are finite.
    i, log_f = jnp.maximum(i.astype(wide), _CLOSED), forgets(log_f.astype(wide))
    resets = chunks.resets_of(segment_ids)

    def run(tokens, state):
        tokens = only_finite(tokens)
        if implementation == "recurrent":
            return chunks.scan_tokens(_step, state, empty, tokens, segment_ids)
        return _chunked(*tokens, state, resets, segment_ids, chunk_size)

    settings = {"head_axes": (2,) * 5, "check_state": bool(of_state)}
    return contained(run, (q, k, v, i, log_f), state, resets, **settings)


def _chunked(q, k, v, i, log_f, state, resets, segment_ids, chunk_size):
    wide = i.dtype
    m, m_before = _stabilizers(i, log_f, state.stabilizer, resets)
    keys = (k.astype(wide) * (jnp.exp(i - m) * q.shape[-1] ** -0.5)[..., None]).astype(q.dtype)
    v_and_one = jnp.concatenate([v.astype(wide), jnp.ones((*v.shape[:3], 1), wide)], axis=-1)
    memory_and_normalizer = jnp.concatenate([state.memory, state.normalizer[..., None]], axis=-1)
    gates = log_f + m_before - m
    read, joint = attend_in_chunks(
        q, keys, v_and_one, gates, memory_and_normalizer, segment_ids, 1.0, chunk_size
    )
    o = _normalize(read[..., :-1], read[..., -1], m).astype(v.dtype)
    last = m[:, -1] if m.shape[1] else state.stabilizer
    return o, MLSTMState(joint[..., :-1], joint[..., -1], last)


def mlstm_step(
    state: MLSTMState,
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    i: Float[Array, "B H"],
    log_f: Float[Array, "B H"],
) -> tuple[Float[Array, "B H V"], MLSTMState]:
    """One token: returns the output and the state after it; see :func:`mlstm`."""
    _check(q, k, v, i, log_f, state, "state", None, one_token=True)
    return _step(state, q, k, v, jnp.maximum(i, _CLOSED), forgets(log_f))


def _check(q, k, v, i, log_f, state, state_name, segment_ids, one_token=False) -> None:
    arrays = {
        "q": (q, "B T H K"),
        "k": (k, "B T H K"),
        "v": (v, "B T H V"),
        "i": (i, "B T H"),
        "log_f": (log_f, "B T H"),
    }
    if state is not None or one_token:
        fields = fields_of(state_name, state, MLSTMState).items()
        layouts = ("B H K V", "B H K", "B H")
        arrays |= {n: (x, layout) for (n, x), layout in zip(fields, layouts, strict=True)}
    check_arrays(arrays | {"segment_ids": (segment_ids, "B T")}, one_token)


def _step(state: MLSTMState, q, k, v, i, log_f):
    matmul, wide = Matmul.wide(q.dtype, None), accumulator_dtype(q.dtype)
    i, log_f = i.astype(wide), log_f.astype(wide)
    m_BH = jnp.maximum(log_f + state.stabilizer, i)
    forget_BH = jnp.exp(log_f + state.stabilizer - m_BH)
    write_BHK = (jnp.exp(i - m_BH) * q.shape[-1] ** -0.5)[..., None] * k.astype(wide)
    memory = forget_BH[..., None, None] * state.memory
    memory += write_BHK[..., None] * v.astype(wide)[..., None, :]
    normalizer = forget_BH[..., None] * state.normalizer + write_BHK
    read_BHV = matmul("bhk,bhkv->bhv", q, memory)
    weight_BH = matmul("bhk,bhk->bh", q, normalizer)
    o_BHV = _normalize(read_BHV, weight_BH, m_BH).astype(v.dtype)
    return o_BHV, MLSTMState(memory, normalizer, m_BH)


def _normalize(read, weight, m):
    """``read / (max(|weight|, exp(-m)) + eps)``, where exp(-m) must not overflow.

    The bound is the square root of the largest number; beyond it the output is below one part in
    that of its value anyway, and its gradient stays finite.
    """
    highest = 0.5 * math.log(jnp.finfo(m.dtype).max)
    floor = jnp.exp(jnp.minimum(-m, highest))
    return read / (jnp.maximum(jnp.abs(weight), floor) + _EPS)[..., None]


def _stabilizers(i_BTH, log_f_BTH, before_BH, resets_BT):
    """m after every token, and before it (0 before the first token of a later segment)."""

    def then(first, second):
        # m -> max(a + m, b), one after the other.
        return first[0] + second[0], jnp.maximum(second[0] + first[1], second[1])

    if not i_BTH.shape[1]:
        return i_BTH, i_BTH
    a, b = log_f_BTH, i_BTH
    if resets_BT is not None:
        reset = resets_BT[..., None]
        a, b = jnp.where(reset, -jnp.inf, a), jnp.where(reset, jnp.maximum(a, b), b)
    a, b = jax.lax.associative_scan(then, (a, b), axis=1)
    m = jnp.maximum(a + before_BH[:, None], b)
    m_before = jnp.concatenate([before_BH[:, None], m[:, :-1]], axis=1)
    if resets_BT is not None:
        m_before = jnp.where(resets_BT[..., None], 0, m_before)
    return m, m_before
