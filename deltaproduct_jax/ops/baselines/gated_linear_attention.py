"""Linear attention with a gate per head or per key channel: Mamba-2, GLA, and mLSTM's memory.

    S_t = diag(gate_t) S_{t-1} + k_t v_t^T,    o_t = scale * S_t^T q_t,    gate_t = +-exp(g_t)

Sources: Mamba-2 (Dao and Gu, 2024), GLA (Yang et al., 2024), their chunked forms among them;
negative gates are the extended range of Grazzi et al. (ICLR 2025).
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from deltaproduct_jax.ops.baselines import chunks
from deltaproduct_jax.ops.baselines.gates import fold_signs
from deltaproduct_jax.ops.baselines.sequences import check_together, run_checked
from deltaproduct_jax.ops.checks import check_scale
from deltaproduct_jax.ops.containment import contained, only_finite
from deltaproduct_jax.ops.decays import forgets
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype

Gate = Float[Array, "B T H"] | Float[Array, "B T H K"]
Sign = Bool[Array, "B T H"] | Bool[Array, "B T H K"]


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Gate,
    *,
    negative: Sign | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Gated linear attention over whole sequences.

    Args:
        q: queries.
        k: keys.
        v: values.
        g: log of the gate's magnitude, at most 0; per head, or per head and key channel.
        negative: as ``g``, True where the gate is below 0; None for nowhere.
        scale: multiplies q; None for ``K**-0.5``.
        initial_state: state before the first token, float32 (float64 with float64 inputs); None for
            zeros. It continues each row's first segment.
        segment_ids: sequence that each token belongs to; the state starts anew where it changes.
        implementation: ``"recurrent"``, a scan over tokens; ``"chunked"``, matmuls within chunks
            and a scan over them; None for the latter.
        chunk_size: tokens in a chunk; None for 64.

    Returns:
        ``(o, final_state)``, in the dtype of ``v``, and in float32 at least.

    Raises:
        ValueError: naming the argument, what it got and what it may be.
    """
    arrays, layouts = _arrays(q, k, v, g, negative)
    options = {"scale": scale, "implementation": implementation, "chunk_size": chunk_size}
    return run_checked(_run, arrays, layouts, initial_state, segment_ids, **options)


def _run(arrays, *, scale, implementation, chunk_size):
    q, k, v, g, negative, initial_state, segment_ids = arrays.values()
    state = chunks.start(initial_state, k, v)
    if 0 in v.shape:
        return v, state

    def run(tokens, state):
        q, k, v, g = only_finite(tokens)
        if implementation == "recurrent":
            step = functools.partial(_step, scale=scale)
            inputs = (q, k, v, g, negative)
            return chunks.scan_tokens(step, state, jnp.zeros_like(state), inputs, segment_ids)
        sign = None
        if negative is not None:
            (q, k), sign = fold_signs(negative, q, k)
        o, state = attend_in_chunks(q, k, v, g, state, segment_ids, scale, chunk_size)
        return o, state if sign is None else state * sign.astype(state.dtype)

    settings = {"head_axes": (2, 2, 2, 2), "check_state": initial_state is not None}
    resets = chunks.resets_of(segment_ids)
    return contained(run, (q, k, v, forgets(g)), state, resets, **settings)


def gated_linear_attention_step(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    g: Float[Array, "B H"] | Float[Array, "B H K"],
    *,
    negative: Bool[Array, "B H"] | Bool[Array, "B H K"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token: returns the output and the state after it; see :func:`gated_linear_attention`."""
    arrays, layouts = _arrays(q, k, v, g, negative)
    check_together(arrays, layouts, state, one_token=True)
    return _step(state, q, k, v, g, negative, check_scale(scale, q.shape[-1]))


def _arrays(q, k, v, g, negative) -> tuple[dict, dict]:
    """All by name, and their layouts along T."""
    keys = ("B", "T", "H", "K")
    gate = keys if np.ndim(g) == np.ndim(q) else keys[:3]  # which may be no arrays yet
    arrays = {"q": q, "k": k, "v": v, "g": g, "negative": negative}
    return arrays, {"q": keys, "k": keys, "v": (*keys[:3], "V"), "g": gate, "negative": gate}


def _step(state_BHKV, q, k, v, g, negative, scale):
    wide = accumulator_dtype(q.dtype)
    matmul = Matmul.wide(q.dtype, None)
    gate = jnp.exp(g.astype(wide))
    if negative is not None:
        gate = jnp.where(negative, -gate, gate)
    if gate.ndim == 2:
        gate = gate[..., None]
    write_BHKV = k.astype(wide)[..., None] * v.astype(wide)[..., None, :]
    state_BHKV = gate[..., None] * state_BHKV + write_BHKV
    o_BHV = scale * matmul("bhk,bhkv->bhv", q, state_BHKV)
    return o_BHV.astype(v.dtype), state_BHKV


def attend_in_chunks(q, k, v, g, state, segment_ids, scale, chunk_size):
    """The chunked form of gates that are not negative, for finite operands."""
    wide = accumulator_dtype(q.dtype)
    matmul = Matmul.of(q.dtype, None)
    g = g.astype(wide)
    g = g[..., None] if g.ndim == 3 else g

    def body(state_BHKV, chunk):
        q_BHCK, k_BHCK, v_BHCV, g_BHCK, resets_BC = chunk
        decays = chunks.diagonal_decays(g_BHCK, resets_BC)
        scores_BHCC = scale * chunks.decayed_products(q_BHCK, k_BHCK, decays, matmul)
        o_BHCV = matmul("bhcs,bhsv->bhcv", scores_BHCC, v_BHCV)
        reads_BHCK = scale * q_BHCK.astype(wide) * decays.into
        o_BHCV += matmul("bhck,bhkv->bhcv", reads_BHCK, state_BHKV)
        writes_BHCK = k_BHCK.astype(wide) * decays.out
        state_BHKV = decays.through[..., None] * state_BHKV
        state_BHKV += matmul("bhck,bhcv->bhkv", writes_BHCK, v_BHCV)
        return state_BHKV, o_BHCV.astype(v.dtype)

    return chunks.scan_chunks(body, state, (q, k, v, g), segment_ids, chunk_size)
