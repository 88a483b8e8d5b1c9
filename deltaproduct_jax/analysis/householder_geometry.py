"""The Householder factors that a trained model makes of its tokens: betas, keys, eigenvalues.

A token's transition in a head is ``A = exp(g) (I - beta_R k_R k_R^T) ... (I - beta_1 k_1 k_1^T)``.
Where beta is 2 a factor is a reflection, and where the keys of all tokens lie in a subspace of few
dimensions the head acts as a group of rotations and reflections there: in the DeltaProduct paper
(https://arxiv.org/abs/2502.10297) a model that has learnt S4 keeps its keys in three dimensions,
where S4 is the rotation group of the cube. Computed in float64.

Dimension key: ``T`` tokens looked at, ``R`` factors per token, ``Hv`` value heads, ``K`` key width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.analysis.token_ids import token_ids
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import GatedDeltaProduct
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.ops.precision import L2NORM_EPSILON
from deltaproduct_jax.settings import require_kind

TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Factors:
    """Normalised keys ``[T, R, Hv, K]``, betas ``[T, R, Hv]`` and decays ``exp(g)`` ``[T, Hv]``."""

    k: np.ndarray
    beta: np.ndarray
    decay: np.ndarray


def factors_of_tokens(
    model: SequenceModel, tokens: Sequence[int], *, before: int | None = None, layer: int = 0
) -> Factors:
    """The factors of each token at the start of a sequence.

    In the first layer without short convolution they depend on the token alone, so that they are
    the same anywhere.

    Args:
        model: with a delta mixer in the layer looked at.
        tokens: ids, each read in a sequence of its own.
        before: id that stands before each, as BOS; None for nothing.
        layer: which block, from 0.

    Raises:
        ConfigError: there is no such layer, its mixer has no Householder factors, or ``tokens`` or
            ``before`` are not ids of the model's.
    """
    require_kind("layer", layer, int)
    if not 0 <= layer < len(model.layers):
        raise ConfigError(f"layer={layer} is not there; it may be 0 to {len(model.layers) - 1}")
    block = model.layers[layer]
    if not isinstance(block.attn, GatedDeltaProduct):
        raise ConfigError(
            f"mixer={model.config.mixer!r} has no Householder factors; it may be a delta_net or "
            "delta_product mixer"
        )
    rows = token_ids("tokens", tokens, "T", model)[:, None]
    if before is not None:
        first = token_ids("before", [before], "1", model)
        rows = np.insert(rows, 0, first, axis=1)
    x = model.embeddings(jnp.asarray(rows))
    for earlier in list(model.layers)[:layer]:
        x, _ = earlier(x)
    found = block.attn.token_factors(block.attn_norm(x))
    k, beta = (np.asarray(a[:, -1], np.float64) for a in (found.k, found.beta))
    k = np.repeat(k, beta.shape[-1] // k.shape[-2], axis=-2)  # a key head serves several of values
    decay = np.ones(beta[:, 0].shape)
    if found.g is not None:
        decay = np.exp(np.asarray(found.g[:, -1], np.float64))
    return Factors(normalised(k), beta, decay)


def normalised(k: np.ndarray) -> np.ndarray:
    """Keys as the op has them, over their last axis; tiny ones are less than unit vectors."""
    return k / np.sqrt(np.sum(k * k, axis=-1, keepdims=True) + L2NORM_EPSILON)


def transitions(factors: Factors) -> np.ndarray:
    """The matrices ``A`` of every token and head, ``[T, Hv, K, K]``."""
    T, R, Hv, K = factors.k.shape
    product = np.broadcast_to(np.eye(K), (T, Hv, K, K))
    for r in range(R):
        k, beta = factors.k[:, r], factors.beta[:, r]
        product = product - beta[..., None, None] * np.einsum("thk,thl,thlm->thkm", k, k, product)
    return factors.decay[..., None, None] * product


def explained(vectors: np.ndarray, *, centred: bool) -> np.ndarray:
    """Cumulative fraction of the vectors' square sum in their principal directions.

    Args:
        vectors: ``[N, K]``.
        centred: about their mean, as variance has it. A key and its negative are the same
            reflection, and only sums about zero know that.

    Returns:
        ``[min(N, K)]``, ascending to 1; ones where the vectors do not vary at all.
    """
    vectors = vectors - vectors.mean(0) if centred else vectors
    squares = np.linalg.svd(vectors, compute_uv=False) ** 2
    total = squares.sum()
    return np.cumsum(squares) / total if total > 1e-24 * len(vectors) else np.ones(len(squares))


def reflecting_heads(factors: Factors, tolerance: float = TOLERANCE) -> list[int]:
    """Heads whose every beta, over all tokens and factors, is at least 2 - ``tolerance``."""
    smallest = factors.beta.min(axis=(0, 1))
    return [int(head) for head in np.flatnonzero(smallest >= 2 - tolerance)]


def geometry(factors: Factors, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """All of it as plain values for JSON.

    Returns:
        ``reflecting_heads`` and, for each head, ``beta`` ``[T, R]``, ``decay`` ``[T]``,
        ``explained_variance`` and ``explained_about_zero`` of all its keys, and ``eigenvalues``
        ``[T, K, 2]``, real and imaginary parts, those farthest from 1 first.
    """
    eigenvalues = np.linalg.eigvals(transitions(factors)).astype(np.complex128)
    order = np.argsort(-np.abs(eigenvalues - 1), axis=-1, kind="stable")
    eigenvalues = np.take_along_axis(eigenvalues, order, axis=-1)
    heads = []
    for head in range(factors.beta.shape[-1]):
        keys = factors.k[:, :, head].reshape(-1, factors.k.shape[-1])
        values = eigenvalues[:, head]
        heads.append(
            {
                "beta": factors.beta[:, :, head].tolist(),
                "decay": factors.decay[:, head].tolist(),
                "explained_variance": explained(keys, centred=True).tolist(),
                "explained_about_zero": explained(keys, centred=False).tolist(),
                "eigenvalues": np.stack([values.real, values.imag], axis=-1).tolist(),
            }
        )
    return {"reflecting_heads": reflecting_heads(factors, tolerance), "heads": heads}
