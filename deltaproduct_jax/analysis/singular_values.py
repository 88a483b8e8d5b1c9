"""Singular values of many matrices at once, where a library takes one after another.

On a CPU LAPACK has them in a millisecond each. On a GPU, JAX hands matrices of more than 32 columns
to a routine for a single one, and the states of a language model are hundreds of thousands of 128
by 128. Here all go through one-sided Jacobi rotations together (Hestenes, 1958): columns are
rotated in pairs until all are orthogonal, and their lengths then are the singular values. Every
round rotates as many disjoint pairs as there are, and the pairs go round as Brent and Luk (1985)
have them.

Dimension key: ``M`` rows, ``P`` pairs of columns.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MOST_SWEEPS = 30  # of matrices of 128 columns about 8 are needed
# Cosine of two columns up to which they count as orthogonal: singular values are off by its square.
ORTHOGONAL = 1e-4


def singular_values(matrices: Float[Array, "*batch K V"]) -> Float[Array, "*batch values"]:
    """The min(K, V) singular values of each, descending."""
    by_lapack = lambda a: jnp.linalg.svd(a, compute_uv=False)
    return jax.lax.platform_dependent(matrices, cpu=by_lapack, default=by_rotations)


def by_rotations(matrices: Float[Array, "*batch K V"]) -> Float[Array, "*batch values"]:
    """The same by Jacobi rotations of all matrices together, on any platform."""
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = jnp.swapaxes(matrices, -1, -2)
    number = matrices.shape[-1]
    largest = jnp.max(jnp.abs(matrices), axis=(-2, -1), keepdims=True)
    unit = matrices / jnp.where(largest > 0, largest, 1)
    unit = jnp.pad(unit, [(0, 0)] * (unit.ndim - 1) + [(0, number % 2)])  # an even number
    # Shorter columns are what rounding left.
    eps = jnp.finfo(unit.dtype).eps
    noise = eps**2 * jnp.sum(unit * unit, axis=(-2, -1))[..., None]
    rounds = unit.shape[-1] - 1

    def round_of(_, carry):
        x, y, widest = carry
        x, y, cosine = _rotated(x, y, noise)
        return *_next_pairs(x, y), jnp.maximum(widest, jnp.max(cosine, initial=0))

    def sweep(carry):
        x, y, _, count = carry
        widest = jnp.zeros((), x.dtype)
        return *jax.lax.fori_loop(0, rounds, round_of, (x, y, widest)), count + 1

    unfinished = lambda carry: (carry[2] > ORTHOGONAL) & (carry[3] < MOST_SWEEPS)
    x, y = jnp.split(unit, 2, axis=-1)
    start = x, y, jnp.full((), jnp.inf, x.dtype), jnp.int32(0)
    x, y, *_ = jax.lax.while_loop(unfinished, sweep, start)
    lengths = jnp.sqrt(jnp.sum(jnp.square(jnp.concatenate([x, y], axis=-1)), axis=-2))
    return jnp.flip(jnp.sort(lengths, axis=-1), axis=-1)[..., :number] * largest[..., 0]


def _rotated(
    x: Float[Array, "*batch M P"], y: Float[Array, "*batch M P"], noise: Float[Array, "*batch 1"]
) -> tuple[Array, Array, Array]:
    """Pairs of columns turned until they are orthogonal, and the cosines before."""
    xx, yy, xy = (jnp.sum(a * b, axis=-2) for a, b in ((x, x), (y, y), (x, y)))
    counts = (jnp.minimum(xx, yy) > noise) & (xy != 0)
    cosine = jnp.where(counts, jnp.abs(xy) / jnp.sqrt(jnp.where(counts, xx * yy, 1)), 0)
    half = (yy - xx) / jnp.where(counts, 2 * xy, 1)
    tangent = jnp.where(half < 0, -1, 1) / (jnp.abs(half) + jnp.sqrt(1 + half * half))
    tangent = jnp.where(counts, tangent, 0)
    c = jax.lax.rsqrt(1 + tangent * tangent)[..., None, :]
    s = tangent[..., None, :] * c
    return c * x - s * y, s * x + c * y, cosine


def _next_pairs(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All columns but the first move on by one place, up one side and down the other."""
    if x.shape[-1] == 1:
        return x, y
    up = jnp.concatenate([x[..., :1], y[..., :1], x[..., 1:-1]], axis=-1)
    return up, jnp.concatenate([y[..., 1:], x[..., -1:]], axis=-1)
