"""Where state tracking ends: how far states stray, over how far apart classes of them stand.

A recurrence that is affine in its state, ``S_t = A(x_t) S_(t-1) + b(x_t)``, does not correct errors
along directions that tell states apart. The claim is that of https://arxiv.org/abs/2605.07755,
credited for the idea: spread grows over an initial separation that stays, and where their ratio
crosses what the decoder reads, accuracy ends. What follows was derived here, from the recurrence.

*Why.* Let the letter x take the class g to ``gx``, and let ``h_g`` be the state that stands for g.
If states are preserved, ``h_gx = A(x) h_g + b(x)``, so that ``A(x)`` permutes the differences ``h_g
- h_g'``; on their span U some power of it is the identity, and an error ``e = S - h_g`` along U is
carried from token to token and never dies out. If ``A(x)`` does shrink errors along U, it shrinks
the differences too: states go to their common centre, which a decoder that was trained for the
first separation reads wrongly all the same. Either way ``e`` grows. So the reference is ``h_g`` of
early positions, not the means of each position, which drift along.

*Ratio.* Of class g along the line to another, g', with ``d = |h_g' - h_g|``: the root mean square
of ``e . (h_g' - h_g) / d``, over d. Of a class it is the largest over the others, of a position the
mean over classes. The mean of ``e . (h_g' - h_g) / d^2`` itself, along the line that was largest,
is the *shift*: what all states of a class share.

*Limit.* Between two classes a state is read as the wrong one where ``e`` along the line exceeds
``d / 2``. With errors that are normal about the reference this is one of ``1 - a`` states where
``ratio = 1 / (2 z)``, z the normal quantile of a: .39 for a = .9. By Chebyshev's inequality errors
of no distribution do it before ``sqrt((1 - a) / 4)``, .16; a pure shift does it to all at once, at
1/2. A class with several neighbours fails somewhat before one with a single one.

*Growth.* Over s tokens since the reference, with a ratio ``floor`` that was there already:

====================  ===========================================  ================================
law                   ratio squared                                where it comes from
====================  ===========================================  ================================
linear                ``floor^2 + (rate s)^2``                     every token adds the same error
sqrt                  ``floor^2 + rate^2 s``                       errors of tokens are independent
contraction           ``floor^2 + ((1 - exp(-rate s)) / 2)^2``     U shrinks to its centre
exponential           ``(floor exp(rate s))^2``                    ``A(x)`` stretches errors
====================  ===========================================  ================================

The half is what a map that shrinks U by ``exp(-rate)`` gives where all ``h_g`` are equally far from
their centre: on the line to another class the centre lies at d / 2. Householder factors with beta
in [0, 2] and decays stretch nothing but by rounding, so that the last law is for other mixers.

Dimension key: ``N`` words, ``T`` positions, ``P`` of them looked at, ``F`` numbers of a state,
``G`` classes.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import SequenceModel

SMALLEST_DIRECTION = 1e-4  # of the largest; what is below is rounding
# Rates that a fit tries, down to so many decades below one over the tokens, then between the best's
# neighbours: they are right to 1e-4 of their size.
TRIED, DECADES, REFINED = 4000, 14, 201


class Words(NamedTuple):
    """What a model made of words.

    Attributes:
        answers: ``[N, T]``, its likeliest id after each token.
        states: ``[N, T, F]`` float32, a block's state after each token, or its coordinates; of
            some of the tokens ``[N, P, F]``.
    """

    answers: np.ndarray
    states: np.ndarray


class Separation(NamedTuple):
    """Of each position ``[P]``, means over classes: ``ratio``, and the ``shift`` along its line."""

    ratio: np.ndarray
    shift: np.ndarray


@dataclasses.dataclass(frozen=True)
class Growth:
    """A law of growth: its name, its two parameters, and how far the points were from it.

    Attributes:
        law: one of ``LAWS``.
        floor: ratio at the reference.
        rate: per token, or per root of a token.
        residual: root mean square of the points' distance from the law.
    """

    law: str
    floor: float
    rate: float
    residual: float

    def at(self, since: np.ndarray) -> np.ndarray:
        """The ratio so many tokens after the reference."""
        spared, added = LAWS[self.law](np.asarray(since, np.float64), self.rate)
        return np.sqrt(self.floor**2 * spared + added)

    def reaches(self, limit: float) -> float:
        """Tokens after the reference at which the ratio is ``limit``; infinite where never."""
        if self.floor >= limit:
            return 0.0
        left = math.sqrt(limit**2 - self.floor**2)
        if not self.rate or (self.law == "contraction" and left >= 0.5):
            return math.inf
        if self.law == "linear":
            return left / self.rate
        if self.law == "sqrt":
            return (left / self.rate) ** 2
        if self.law == "contraction":
            return -math.log1p(-2 * left) / self.rate
        return math.log(limit / self.floor) / self.rate if self.floor else math.inf


def _exponential(s: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    return np.exp(np.minimum(2 * rate * s, 300)), np.zeros_like(rate * s)


# Law -> (tokens, rate) -> what the floor's square is multiplied by, and what is added to it.
LAWS = {
    "linear": lambda s, rate: (np.ones_like(rate * s), (rate * s) ** 2),
    "sqrt": lambda s, rate: (np.ones_like(rate * s), rate**2 * s),
    "contraction": lambda s, rate: (np.ones_like(rate * s), (np.expm1(-rate * s) / 2) ** 2),
    "exponential": _exponential,
}


def read_words(
    model: SequenceModel,
    words: np.ndarray,
    layer: int = 0,
    directions: np.ndarray | None = None,
    places: np.ndarray | None = None,
) -> Words:
    """Answers and states of words, read token by token from their start.

    Args:
        model: whose layer looked at has a recurrent state.
        words: ``[N, T]`` ids, BOS first if the model wants it.
        layer: which block, from 0.
        directions: ``[F, r]``; the states are then coordinates along these, ``[N, T, r]``, and
            memory does not grow with F.
        places: ``[P]`` ascending, of the tokens whose states are kept, from 0; None for all.

    Raises:
        ConfigError: there is no such layer, or it has no state of this kind.
    """
    if not 0 <= layer < len(model.layers):
        raise ConfigError(f"layer={layer} is not there; it may be 0 to {len(model.layers) - 1}")
    state = jax.eval_shape(lambda: model.init_state(len(words)))[layer]
    if not isinstance(getattr(state, "recurrent", None), jax.ShapeDtypeStruct):
        raise ConfigError(
            f"mixer={model.config.mixer!r} has no state that is one array; it may be any of the "
            "project's but transformer, mlstm and slstm"
        )
    graph, params = nnx.split(model)
    N, T = np.shape(words)
    kept = np.arange(T) if places is None else np.asarray(places)
    slots = np.full(T, len(kept))  # of tokens whose states are not kept, one behind the others
    slots[kept] = np.arange(len(kept))
    width = math.prod(state.recurrent.shape[1:]) if directions is None else directions.shape[1]

    @jax.jit
    def read(params: nnx.State, words_TN: jax.Array, along: jax.Array | None):
        def token(carry, entry):
            (state, states), (ids, slot) = carry, entry
            logits, state = nnx.merge(graph, params).step(state, ids)
            seen = state[layer].recurrent.reshape(N, -1)
            if along is not None:
                seen = jnp.matmul(seen, along, precision="highest")
            states = states.at[slot].set(seen.astype(jnp.float32))
            return (state, states), jnp.argmax(logits, axis=-1)

        start = nnx.merge(graph, params).init_state(N)
        states = jnp.zeros((len(kept) + 1, N, width), jnp.float32)
        (_, states), answers = jax.lax.scan(token, (start, states), (words_TN, slots))
        return answers, states[:-1]

    along = None if directions is None else jnp.asarray(directions, jnp.float32)
    found = jax.device_get(read(params, jnp.asarray(words, jnp.int32).T, along))
    return Words(*(np.swapaxes(array, 0, 1) for array in found))


def reference_means(states: np.ndarray, classes: np.ndarray, number: int) -> np.ndarray:
    """The mean state of each class, ``[G, F]`` float64, over all words and positions given.

    Args:
        states: ``[N, P, F]``.
        classes: ``[N, P]``, from 0.
        number: of classes, G.

    Raises:
        ConfigError: a class has no state, or no two classes differ.
    """
    flat, classes = states.reshape(-1, states.shape[-1]).astype(np.float64), classes.reshape(-1)
    counts = np.bincount(classes, minlength=number)
    if len(counts) > number or not counts.all():
        absent = np.flatnonzero(counts[:number] == 0)[:3].tolist()
        raise ConfigError(
            f"classes {absent} of {number} have no state among {len(flat)}; give more words or a "
            "later reference"
        )
    means = np.stack([flat[classes == g].mean(0) for g in range(number)])
    if not np.ptp(means, axis=0).any():
        raise ConfigError(
            f"all {number} classes have the same mean state: nothing tells them apart"
        )
    return means


def discriminating_directions(means: np.ndarray) -> np.ndarray:
    """An orthonormal basis ``[F, r]`` of the span of the means' differences."""
    _, sizes, rows = np.linalg.svd(means - means.mean(0), full_matrices=False)
    return rows[sizes > SMALLEST_DIRECTION * sizes[0]].T


def separation(
    states: np.ndarray, classes: np.ndarray, means: np.ndarray, others: np.ndarray | None = None
) -> Separation:
    """Ratio and shift of each position, over the classes that are there.

    A mean of m states strays by a part 1 / m of their square from the class that it stands for, in
    directions that tell nothing too. Were an error taken from it and measured along a line to it,
    that part would come out as a shift; where such directions are wide it is the larger one. So
    errors from one mean are measured along lines between ``others``, and the other way round, and a
    square is the product of both. No two of the states, the means and the others are to be of the
    same words.

    A root mean square over few states is a noisy one, and the largest of several is too large by
    that: give some 20 words a class.

    Args:
        states: ``[N, P, F]``.
        classes: ``[N, P]``.
        means: ``[G, F]``, the references.
        others: the same of other words; None where the references are exact.

    Raises:
        ConfigError: two classes have the same mean.
    """
    pair = (means, means if others is None else others)
    towards = [each[None] - each[:, None] for each in pair]  # [G, G, F], from the first on
    squares = (towards[0] * towards[1]).sum(-1)
    np.fill_diagonal(squares, np.inf)
    if squares.min() <= SMALLEST_DIRECTION**2 * np.max(
        squares, where=np.isfinite(squares), initial=0
    ):
        g, other = np.unravel_index(squares.argmin(), squares.shape)
        raise ConfigError(
            f"classes {g} and {other} have the same mean state, as far as so many words tell; they "
            "must differ"
        )
    ratios, shifts = [], []
    for at in range(states.shape[1]):
        of_classes = []
        for g in np.unique(classes[:, at]):
            here = states[classes[:, at] == g, at].astype(np.float64)
            # [n, G], in units of the distance; 0 to itself.
            first, second = (
                (here - mean[g]) @ lines[g].T / squares[g]
                for mean, lines in zip(pair, reversed(towards), strict=True)
            )
            sizes = np.sqrt(np.maximum((first * second).mean(0), 0))
            worst = sizes.argmax()
            of_classes.append((sizes[worst], (first + second)[:, worst].mean() / 2))
        ratio, shift = np.mean(of_classes, axis=0)
        ratios.append(ratio)
        shifts.append(shift)
    return Separation(np.array(ratios), np.array(shifts))


def limit_of_ratio(accuracy: float) -> float:
    """The ratio at which a part ``accuracy`` of the states is read right, as the module derives it.

    Raises:
        ConfigError: the accuracy is not between .5 and 1.
    """
    if not 0.5 < accuracy < 1:
        raise ConfigError(f"accuracy={accuracy} must be between .5 and 1, both left out")
    return 1 / (2 * statistics.NormalDist().inv_cdf(accuracy))


def fit_growth(since: np.ndarray, ratio: np.ndarray, laws: Sequence[str] = tuple(LAWS)) -> Growth:
    """The law that the points are closest to, by the root mean square of their distance from it.

    Every law has two parameters, so that none is favoured; of equals the first in ``LAWS`` is
    taken. Rates are tried on a logarithmic grid, twice; the floor follows from each in closed form.

    Args:
        since: tokens after the reference, positive.
        ratio: at each.
        laws: those to choose from.

    Raises:
        ConfigError: there are fewer than three points.
    """
    if len(since) < 3:
        raise ConfigError(f"{len(since)} points cannot choose a law; there must be at least 3")
    s, ratio = np.asarray(since, np.float64), np.asarray(ratio, np.float64)

    def best_of(law: str, rates: np.ndarray) -> Growth:
        spared, added = LAWS[law](s, rates[:, None])
        squares = (spared * (ratio**2 - added)).sum(1) / (spared**2).sum(1)
        floors = np.sqrt(np.maximum(squares, 0))
        off = np.sqrt(floors[:, None] ** 2 * spared + added) - ratio
        residuals = np.sqrt((off**2).mean(1))
        best = residuals.argmin()
        return Growth(law, *(float(each[best]) for each in (floors, rates, residuals)))

    rates = np.logspace(-DECADES, 2, TRIED) / s.max()
    step, found = rates[1] / rates[0], []
    for law in laws:
        coarse = best_of(law, np.array([0.0, *rates]))
        found.append(best_of(law, coarse.rate * step ** np.linspace(-1, 1, REFINED)))
    return min(found, key=lambda growth: growth.residual)


def first_above(positions: np.ndarray, values: np.ndarray, limit: float) -> float | None:
    """Where a curve first reaches ``limit``, on lines between its points; None if it does not."""
    above = np.flatnonzero(np.asarray(values) >= limit)
    if not len(above):
        return None
    at = above[0]
    if not at:
        return float(positions[0])
    x, y = positions[at - 1 : at + 1], values[at - 1 : at + 1]
    return float(x[0] + (limit - y[0]) / (y[1] - y[0]) * (x[1] - x[0]))


def failing_position(correct: np.ndarray, accuracy: float) -> int | None:
    """The first position, from 1, at which fewer than ``accuracy`` of the words are right.

    Args:
        correct: ``[N, T]``, whether each answer was right.
        accuracy: the least that holds.
    """
    below = np.flatnonzero(np.asarray(correct).mean(0) < accuracy)
    return int(below[0]) + 1 if len(below) else None
