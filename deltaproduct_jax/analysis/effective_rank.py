"""The effective rank of a model's states along a text: how full its memory is, head by head.

That of a matrix is the exponential of the entropy of its singular values over their sum (Roy and
Vetterli, 2007). The paper (https://arxiv.org/abs/2502.10297) takes it of every head's state before
every Householder update, along a row of documents with BOS before each and no reset: some heads of
DeltaProduct learn to let it fall where a document begins.

Dimension key: ``T`` tokens, ``R`` updates of a token, ``Hv`` value heads, ``K`` by ``V`` a state;
``S`` tokens at which it is taken.
"""

import concurrent.futures
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from deltaproduct_jax.analysis.token_ids import token_ids
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import GatedDeltaProduct
from deltaproduct_jax.layers.delta_rule import TokenFactors
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.ops.api import delta_product
from deltaproduct_jax.ops.checks import as_array, check_floating
from deltaproduct_jax.ops.precision import L2NORM_EPSILON, accumulator_dtype
from deltaproduct_jax.settings import require_kind

AT_ONCE = 2**26  # bytes of states whose singular values are taken at once, about


def effective_rank(states: Float[Array, "*batch K V"]) -> Float[Array, "*batch"]:
    """From 1 to min(K, V); 0 of a matrix of zeros, NaN of one that is not finite.

    Shares within rounding of 0 count as 0. In float32 at least.
    """
    states = as_array("states", states)
    check_floating("states", states.dtype)
    states = states.astype(accumulator_dtype(states.dtype))
    by_lapack = functools.partial(jnp.linalg.svd, compute_uv=False)
    values = jax.lax.platform_dependent(states, cpu=by_lapack, default=_on_host)
    total = jnp.sum(values, axis=-1, keepdims=True)
    shares = values / jnp.where(total > 0, total, 1)
    counted = shares > jnp.finfo(states.dtype).eps
    entropy = -jnp.sum(jnp.where(counted, shares * jnp.log(jnp.where(counted, shares, 1)), 0), -1)
    rank = jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)
    return jnp.where(jnp.isfinite(total[..., 0]), rank, jnp.nan)


def _on_host(states: jax.Array) -> jax.Array:
    """Singular values by all cores of the host: a GPU's solver takes such matrices one by one."""
    shape = (*states.shape[:-2], min(states.shape[-2:]))
    found = jax.ShapeDtypeStruct(shape, states.dtype)
    return jax.pure_callback(_by_threads, found, states, vmap_method="expand_dims")


def _by_threads(states: np.ndarray) -> np.ndarray:
    """``[*batch, min(K, V)]``, NaN of what is not finite, upon which NumPy's would raise."""
    flat = np.asarray(states).reshape(-1, *states.shape[-2:])
    finite = np.isfinite(flat).all(axis=(1, 2), keepdims=True)
    parts = np.array_split(np.where(finite, flat, 0), max(1, min(len(flat), os.cpu_count() or 1)))
    values = functools.partial(np.linalg.svd, compute_uv=False)
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        found = np.concatenate(list(pool.map(values, parts)))
    return np.where(finite[..., 0], found, np.nan).reshape(*states.shape[:-2], -1)


def ranks_of_model(
    model: SequenceModel, tokens: Sequence[int] | np.ndarray, every: int = 1
) -> dict[int, np.ndarray]:
    """Effective ranks ``[S, R, Hv]`` of each block that has a state of this kind, by its number.

    Args:
        model: with a delta mixer, hybrids included.
        tokens: ids ``[T]``, read from their start.
        every: takes the ranks before the updates of the first of so many tokens, S of them; T must
            be a multiple.

    Raises:
        ConfigError: no block has Householder factors, ``every`` does not divide T, or ``tokens``
            are not ids of the model's.
    """
    ids = jnp.asarray(token_ids("tokens", tokens, "T", model))
    require_kind("every", every, int)
    if every < 1 or ids.shape[0] % every:
        raise ConfigError(f"every={every} must divide the number of tokens, {ids.shape[0]}")
    if not any(isinstance(block.attn, GatedDeltaProduct) for block in model.layers):
        raise ConfigError(
            f"mixer={model.config.mixer!r} has no Householder factors; it may be a delta_net or "
            "delta_product mixer"
        )

    # Blocks that are alike share a program.
    @nnx.jit
    def read(block: nnx.Module, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        ranks = None
        if isinstance(block.attn, GatedDeltaProduct):
            factors = block.attn.token_factors(block.attn_norm(x))
            ranks = ranks_of_factors(jax.tree.map(lambda a: a[0], factors), every)
        return block(x)[0], ranks

    x, found = model.embeddings(ids[None]), {}
    for number, block in enumerate(model.layers):
        x, ranks = read(block, x)
        if ranks is not None:
            found[number] = np.asarray(ranks)
    return found


def ranks_of_factors(factors: TokenFactors, every: int) -> Float[Array, "S R Hv"]:
    """Effective ranks of one row's states, from zeros on.

    Args:
        factors: without their axis B.
        every: as of `ranks_of_model`.
    """
    tokens = _as_updates(factors)
    T, R, Hv, V = tokens["v"].shape
    K = tokens["k"].shape[-1]
    size = _divisor(T // every, max(1, AT_ONCE // (4 * R * Hv * K * V)))
    cut = lambda a: a.reshape(-1, size, every, *a.shape[1:])

    def first_of(state: jax.Array, group: Any) -> tuple[jax.Array, jax.Array]:
        """Through ``every`` tokens; the states before the updates of the first."""
        return _after(state, group), _before_updates(state, jax.tree.map(lambda a: a[0], group))

    def some(state: jax.Array, groups: Any) -> tuple[jax.Array, jax.Array]:
        state, before = jax.lax.scan(first_of, state, groups)
        return state, effective_rank(before)

    state = jnp.zeros((Hv, K, V), tokens["k"].dtype)
    _, ranks = jax.lax.scan(some, state, jax.tree.map(cut, tokens))
    return ranks.reshape(-1, R, Hv)


def _as_updates(factors: TokenFactors) -> dict[str, jax.Array]:
    """Unit keys ``[T, R, Hv, K]``, values, betas and log decays, as the recurrence uses them."""
    beta = factors.beta
    k = factors.k.astype(beta.dtype)
    k = k * jax.lax.rsqrt(jnp.sum(k * k, axis=-1, keepdims=True) + L2NORM_EPSILON)
    k = jnp.repeat(k, beta.shape[-1] // k.shape[-2], axis=-2)
    g = jnp.zeros_like(beta[:, 0]) if factors.g is None else factors.g.astype(beta.dtype)
    return {"k": k, "v": factors.v.astype(beta.dtype), "beta": beta, "g": g}


def _after(state: jax.Array, tokens: dict[str, jax.Array]) -> jax.Array:
    """The state ``[Hv, K, V]`` after tokens: in chunks, as nothing asks for those between."""
    row = {name: value[None] for name, value in tokens.items()}
    q = jnp.zeros_like(row["k"][:, :, 0])
    return delta_product(q, **row, initial_state=state[None], implementation="chunked")[1][0]


def _before_updates(state: jax.Array, token: dict[str, jax.Array]) -> jax.Array:
    """The states ``[R, Hv, K, V]`` before a token's updates."""
    state, before = jnp.exp(token["g"])[:, None, None] * state, []
    for k, v, beta in zip(token["k"], token["v"], token["beta"], strict=True):
        before.append(state)
        wrong = v - jnp.einsum("hkv,hk->hv", state, k)
        state = state + beta[:, None, None] * k[:, :, None] * wrong[:, None, :]
    return jnp.stack(before)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most ``most``."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def summary(
    ranks: np.ndarray, every: int, starts: Sequence[int], trained: int | None
) -> list[dict[str, float | None]]:
    """What each head's ranks ``[S, R, Hv]`` come to.

    Args:
        ranks: of one block.
        every: tokens from one to the next.
        starts: where documents begin, in tokens.
        trained: length of training; None where it is not known.

    Returns:
        For each head ``trained``, the mean rank within that length, and ``end``, that of the last
        quarter of the row; ``kept_at_starts``, the mean rank behind the starts of documents over
        that before them. None where there is nothing to take a mean of.
    """
    of_tokens = ranks.mean(axis=1)  # [S, Hv]
    within = 0 if trained is None else min(trained // every, len(of_tokens))
    # The last before a start, and the first that has seen a whole step behind it.
    pairs = [(start // every, start // every + 2) for start in starts if start >= every]
    pairs = [pair for pair in pairs if pair[1] < len(of_tokens)]
    heads = []
    for of_head in of_tokens.T:
        kept = [of_head[after] / of_head[before] for before, after in pairs if of_head[before] > 0]
        heads.append(
            {
                "trained": float(of_head[:within].mean()) if within else None,
                "end": float(of_head[-max(1, len(of_head) // 4) :].mean()),
                "kept_at_starts": float(np.mean(kept)) if kept else None,
            }
        )
    return heads


def over_heads(
    ranks_by_block: Mapping[int, np.ndarray], every: int, most: int = 256
) -> dict[str, list[float]]:
    """How the ranks of a model's heads lie along the row, few enough numbers for a record.

    Args:
        ranks_by_block: ``[S, R, Hv]`` of each block, S the same.
        every: tokens from one to the next.
        most: places; where there are more, each is the mean of several, and a rest is left out.

    Returns:
        ``position`` in tokens and, over all heads of all blocks, ``mean``, and the 10th and the
        90th percentile, ``low`` and ``high``, to four digits.
    """
    of_heads = np.concatenate([x.mean(axis=1) for x in ranks_by_block.values()], axis=1)
    size = -(-len(of_heads) // most)
    whole = len(of_heads) // size
    places = of_heads[: whole * size].reshape(whole, size, -1).mean(axis=1)  # [place, head]
    low, high = np.quantile(places, (0.1, 0.9), axis=1)
    short = lambda values: [float(f"{x:.4g}") for x in values]
    return {
        "position": [every * size * place for place in range(whole)],
        "mean": short(places.mean(axis=1)),
        "low": short(low),
        "high": short(high),
    }
