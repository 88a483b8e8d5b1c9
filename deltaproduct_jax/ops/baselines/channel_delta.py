"""The delta rule with a gate per key channel: Kimi Delta Attention, its complex form, and erasure.

    S_t = (I - beta_t k_t k_t^T) (I - gamma_t e_t e_t^T) diag(gate_t) S_{t-1} + beta_t k_t v_t^T
    o_t = scale * S_t^T q_t,    gate_t = +-exp(g_t)

Without e this is Kimi Delta Attention (2025, https://arxiv.org/abs/2510.26692), with negative gates
its complex form (Siems et al., 2026, https://arxiv.org/abs/2609.24797), and with e
Erase-then-Delta (Li et al., 2026, https://arxiv.org/abs/2606.26560), of which DeltaProduct with
two factors and no value in the first is the case of equal gates.

Chunked: what factor r of token c adds is its key times a vector u, and what it reads of those
before makes u the solution of a unit lower-triangular system with a row for every factor, as in the
WY form of the delta rule; decays between two tokens are those of GLA's sub-chunks, the same for all
factors. Two factors of a token are two rows of the system, and not two tokens: no decay is computed
twice, and there is no query or value where there is none to read or write.

Shape suffixes as in ``chunks``; R factors of a token, M = C R.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from deltaproduct_jax.ops.baselines import chunks
from deltaproduct_jax.ops.baselines.gates import fold_signs
from deltaproduct_jax.ops.baselines.sequences import check_together, run_checked
from deltaproduct_jax.ops.baselines.wy import read_and_write, solve_writes
from deltaproduct_jax.ops.checks import check_scale
from deltaproduct_jax.ops.containment import contained, only_finite
from deltaproduct_jax.ops.decays import forgets
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype

_KEYS, _STEPS = ("B", "T", "H", "K"), ("B", "T", "H")
# Layout of every array along T.
_LAYOUTS = {
    "q": _KEYS, "k": _KEYS, "v": ("B", "T", "H", "V"), "beta": _STEPS, "g": _KEYS, "e": _KEYS,
    "gamma": _STEPS, "negative": _KEYS,
}  # fmt: skip

# Of keys that agree, at steps of 2, a chunk's writes cancel each other: of 64 gradients err by up
# to 97 times what the plain recurrence's do in float32, of 16 by 11. In bfloat16 rounding hides it.
EXACT_WRITES = 16


def channel_delta(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    g: Float[Array, "B T H K"],
    *,
    e: Float[Array, "B T H K"] | None = None,
    gamma: Float[Array, "B T H"] | None = None,
    negative: Bool[Array, "B T H K"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The recurrence over whole sequences.

    Args:
        q: queries.
        k: keys, unit vectors.
        v: values.
        beta: step sizes of the correcting write, from 0 to 2.
        g: log of the gate's magnitude, at most 0, of every key channel.
        e: addresses that are erased before the write, unit vectors; None for no erasure.
        gamma: how much of them, from 0 to 2; given with ``e``, and only then.
        negative: True where the gate is below 0; None for nowhere.
        scale, initial_state, segment_ids, implementation, chunk_size: as
            :func:`gated_linear_attention` takes them. A chunk has 64 writes by default, and 16 in
            float32; with ``e`` a token has two.

    Returns:
        ``(o, final_state)``, in the dtype of ``v``, and in float32 at least.

    Raises:
        ValueError: naming the argument, what it got and what it may be.
    """
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "g": g}
    arrays |= {"e": e, "gamma": gamma, "negative": negative}
    _check_erasure(e, gamma)
    options = {"scale": scale, "implementation": implementation, "chunk_size": chunk_size}
    return run_checked(_run, arrays, _LAYOUTS, initial_state, segment_ids, **options)


def _run(arrays, *, scale, implementation, chunk_size):
    q, k, v, beta, g, e, gamma, negative, initial_state, segment_ids = arrays.values()
    state = chunks.start(initial_state, k, v)
    if 0 in v.shape:
        return v, state

    def run(tokens, state):
        q, k, v, beta, g, *erasure = only_finite(tokens)
        if implementation == "recurrent":
            step = functools.partial(_step, scale=scale)
            inputs = (q, k, v, beta, g, *(erasure or (None, None)), negative)
            return chunks.scan_tokens(step, state, jnp.zeros_like(state), inputs, segment_ids)
        sign = None
        if negative is not None:
            folded, sign = fold_signs(negative, q, k, *erasure[:1])
            q, k, erasure[:1] = folded[0], folded[1], folded[2:]
        factors = [tuple(erasure), (k, beta)] if erasure else [(k, beta)]
        o, state = _chunked(q, v, g, factors, state, segment_ids, scale, chunk_size)
        return o, state if sign is None else state * sign.astype(state.dtype)

    tokens = (q, k, v, beta, forgets(g), *(() if e is None else (e, gamma)))
    settings = {"head_axes": (2,) * len(tokens), "check_state": initial_state is not None}
    return contained(run, tokens, state, chunks.resets_of(segment_ids), **settings)


def channel_delta_step(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    beta: Float[Array, "B H"],
    g: Float[Array, "B H K"],
    *,
    e: Float[Array, "B H K"] | None = None,
    gamma: Float[Array, "B H"] | None = None,
    negative: Bool[Array, "B H K"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token: returns the output and the state after it; see :func:`channel_delta`."""
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "g": g}
    arrays |= {"e": e, "gamma": gamma, "negative": negative}
    _check_erasure(e, gamma)
    check_together(arrays, _LAYOUTS, state, one_token=True)
    return _step(state, q, k, v, beta, g, e, gamma, negative, check_scale(scale, q.shape[-1]))


def _check_erasure(e: jax.Array | None, gamma: jax.Array | None) -> None:
    if (e is None) != (gamma is None):
        given, other = ("gamma", "e") if e is None else ("e", "gamma")
        raise ValueError(
            f"{given} means nothing without {other}, got {other}=None; give both, or neither"
        )


def _step(state_BHKV, q, k, v, beta, g, e, gamma, negative, scale):
    wide = accumulator_dtype(q.dtype)
    matmul = Matmul.wide(q.dtype, None)
    gate = jnp.exp(g.astype(wide))
    if negative is not None:
        gate = jnp.where(negative, -gate, gate)
    state_BHKV = gate[..., None] * state_BHKV
    for key, size, value in ((e, gamma, 0), (k, beta, v.astype(wide))):
        if key is not None:
            error_BHV = value - matmul("bhk,bhkv->bhv", key, state_BHKV)
            write_BHV = size.astype(wide)[..., None] * error_BHV
            state_BHKV += key.astype(wide)[..., None] * write_BHV[..., None, :]
    o_BHV = scale * matmul("bhk,bhkv->bhv", q, state_BHKV)
    return o_BHV.astype(v.dtype), state_BHKV


def _chunked(q, v, g, factors, state, segment_ids, scale, chunk_size):
    """The chunked form of gates that are not negative; only the last factor writes a value."""
    wide = accumulator_dtype(q.dtype)
    matmul, exact = Matmul.of(q.dtype, None), Matmul.wide(q.dtype, None)
    R = len(factors)

    def body(state_BHKV, chunk):
        q_BHCK, v_BHCV, g_BHCK, *keys_and_sizes, resets_BC = chunk
        keys = [key.astype(wide) for key in keys_and_sizes[:R]]
        sizes_BHM1 = _rows([size.astype(wide) for size in keys_and_sizes[R:]])
        B, H, C, _ = q_BHCK.shape
        decays = chunks.diagonal_decays(g_BHCK, resets_BC)

        # Row (c, r) reads the state after the gate of token c, and all rows above it.
        products = [[chunks.decayed_products(a, b, decays, exact) for b in keys] for a in keys]
        system = jnp.stack([jnp.stack(row, axis=-1) for row in products], axis=3)  # BHCRCR
        system_BHMM = sizes_BHM1 * system.reshape(B, H, C * R, C * R)
        reads = [matmul("bhck,bhkv->bhcv", key * decays.into, state_BHKV) for key in keys]
        errors_BHMV = _rows([-read for read in reads[:-1]] + [v_BHCV.astype(wide) - reads[-1]])
        u_BHMV = solve_writes(system_BHMM, sizes_BHM1 * errors_BHMV, exact, matmul)
        u_BHCRV = u_BHMV.reshape(B, H, C, R, -1)
        writes = [(key, u_BHCRV[:, :, :, r]) for r, key in enumerate(keys)]
        o_BHCV, next_BHKV = read_and_write(state_BHKV, q_BHCK, writes, decays, matmul)
        return next_BHKV, (scale * o_BHCV).astype(v.dtype)

    # With beta near 2 and keys alike, errors grow with the rows of the system: 64 of them.
    writes = chunks.DEFAULT_CHUNK if q.dtype != wide else EXACT_WRITES
    chunk_size = chunks.chunk_length(chunk_size, q.shape[1], writes // R)
    keys, sizes = zip(*factors, strict=True)
    inputs = (q, v, g.astype(wide), *keys, *(size[..., None] for size in sizes))
    return chunks.scan_chunks(body, state, inputs, segment_ids, chunk_size)


def _rows(of_factors: list[jax.Array]) -> jax.Array:
    """``[B, H, C, width]`` of every factor to ``[B, H, M, width]``, factors innermost."""
    x = jnp.stack(of_factors, axis=3)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
