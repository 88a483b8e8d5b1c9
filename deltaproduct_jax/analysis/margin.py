"""Where state tracking ends: how much of what the read-out stands do errors of states use up.

A recurrence that is affine in its state, ``S_t = A(x_t) S_(t-1) + b(x_t)``, does not correct errors
along directions that tell states apart; they grow until states are read wrongly. The claim
is that of https://arxiv.org/abs/2605.07755, credited for the idea, which holds the spread within
classes of states against the distance between them. What follows was derived here.

*Errors.* Let ``h_g`` be the state that stands for class g, here the mean over early positions; the
means of each position drift along. The error of a word's state S is ``e = S - h_g``.

*Used.* A ratio of lengths weighs all heads alike, of which the read-out may use one. So it is asked
itself: the largest factor by which the errors of all words can be multiplied, ``h_g + s e``, so
that a part a of the words is still answered rightly after the next token, is the *margin* at that
position, and 1 over it is what the errors have *used* of it. Errors where nothing is read use
nothing. Errors that keep their kind and grow use as much more as they grow, whatever the read-out
is. For one that takes the nearest of two classes, a distance d apart, errors of a standard
deviation c use ``2 z c / d``, z the normal quantile of a. At 1 the words themselves, s = 1, are
right as often as a says: this limit supposes no distribution.

*Why not its slope?* The derivative of a difference of logits at ``h_g`` is what tells of small
errors. But a read-out is flat where it was trained to be sure, and steep at the boundary alone:
the derivative says nothing of where that is.

*Growth.* If states are preserved, ``h_gx = A(x) h_g + b(x)``, so that ``A(x)`` permutes the
differences ``h_g - h_g'``, and on their span U some power of it is the identity: an error along U
never dies out. Seen from the class, what a token adds is turned by a random element of the group.
Of errors that do not depend on the state the mean over elements is zero: no drift grows from them,
but a walk, by the root of the tokens. Of ``A(x)`` being not quite what permutes, the mean is a
multiple of the identity on every representation in U that is irreducible and real (Schur's lemma),
as all are of Sn, Dn and A5: states go to their common centre, as no factor with beta in [0, 2] and
no decay stretches. (In Zn they may also be turned, at an even pace.) The drift outgrows the walk,
late where step sizes are right and directions are not, as a turn shrinks by its square. The law is
that of the drift alone, s tokens after the reference:

    used = floor + centre (1 - exp(-rate s)).

The floor is what errors use that stay as they are; the drift comes on top of their quantile.
``centre`` is what a state at the centre of all classes would have used: measured, and 1 or
somewhat more. Heads that go there at rates of their own have no one rate, and are slower than the
law in the end.

Dimension key: ``N`` words, ``T`` tokens, BOS first, ``P`` of them looked at, ``G`` classes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaproduct_jax.analysis.token_ids import numbers_below, token_ids
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import SequenceModel

# Margins that are told apart: below the least all is lost, and float32 has no digits for errors
# that could be larger by more than the most.
LEAST, MOST = 2.0**-3, 2.0**24
HALVINGS = 10  # of an octave: margins are right to .1%
# Rates that a fit tries, down to so many decades below one over the tokens, then between the best's
# neighbours: they are right to 1e-4 of their size.
TRIED, DECADES, REFINED = 4000, 14, 201


class Reading(NamedTuple):
    """What a model made of words.

    Attributes:
        correct: ``[N, T]``, whether the answer after each token was right.
        used: ``[P]`` float64, the part of the margin used by the state before each token asked for.
        centre: the same of states at the centre of all classes, before the first of these tokens.
    """

    correct: np.ndarray
    used: np.ndarray
    centre: float


@dataclasses.dataclass(frozen=True)
class Growth:
    """How what is used grows, and how far the points were from it.

    Attributes:
        floor: used at the reference.
        rate: at which states go to their centre, per token.
        centre: used by states at the centre of all classes.
        residual: root mean square of the points' distance.
    """

    floor: float
    rate: float
    centre: float
    residual: float

    def at(self, since: np.ndarray) -> np.ndarray:
        """The part of the margin used so many tokens after the reference."""
        return self.floor + _grown(np.asarray(since, np.float64), self.rate, self.centre)

    def reaches(self, limit: float = 1.0) -> float:
        """Tokens after the reference at which ``limit`` is used; infinite where never."""
        if self.floor >= limit:
            return 0.0
        if not self.rate or self.floor + self.centre <= limit:
            return math.inf
        return -math.log1p((self.floor - limit) / self.centre) / self.rate


def _grown(s: np.ndarray, rate: np.ndarray | float, centre: float) -> np.ndarray:
    return -centre * np.expm1(-rate * s)


def margin_of(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The factor at which something first does not hold, by octaves from ``LEAST``, then halved.

    Args:
        holds: of a factor, a float32 scalar, whether it does; traced once.

    Returns:
        A float32 scalar; infinite if it holds at ``MOST``, below ``LEAST`` if it does not there.
    """

    def goes_on(carry: tuple[jax.Array, ...]) -> jax.Array:
        inside, outside, halved = carry
        return jnp.where(jnp.isfinite(outside), halved < HALVINGS, inside < MOST)

    def look(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        inside, outside, halved = carry
        found = jnp.isfinite(outside)
        factor = jnp.where(found, jnp.sqrt(inside * outside), 2 * inside)
        held = holds(factor)
        return jnp.where(held, factor, inside), jnp.where(held, outside, factor), halved + found

    start = jnp.float32(LEAST / 2), jnp.float32(jnp.inf), jnp.int32(0)
    inside, outside, _ = jax.lax.while_loop(goes_on, look, start)
    return jnp.sqrt(inside * outside)


def reference_means(
    model: SequenceModel, words: np.ndarray, classes: np.ndarray, number: int, layer: int = 0
) -> np.ndarray:
    """The mean state of each class, float32 ``[G, ...]``, over all words and tokens but the first.

    Args:
        model: whose layer looked at has a recurrent state.
        words: ``[N, T]`` ids, BOS first.
        classes: ``[N, T]``, after each token, from 0; that of BOS is not looked at.
        number: of classes, G.
        layer: which block, from 0.

    Raises:
        ConfigError: there is no such layer, it has no state of this kind, a class has no state, all
            have the same, or words or classes are not as said.
    """
    words, classes = _checked(model, words, classes, number)
    state = _first_state(model, len(words), layer)
    graph, params = nnx.split(model)
    words_TN = jnp.asarray(np.transpose(words), jnp.int32)
    answers = jnp.zeros(words_TN.shape, jnp.int32)
    sums, counts = np.zeros((number, *state[layer].recurrent.shape[1:])), np.zeros(number)
    for at in range(len(words_TN)):
        state, answers = _read_on(params, state, answers, words_TN, at, at + 1, graph=graph)
        if not at:
            continue
        seen = np.asarray(state[layer].recurrent)
        for g in np.unique(classes[:, at]):
            here = seen[classes[:, at] == g]
            sums[g] += here.sum(0, dtype=np.float64)
            counts[g] += len(here)
    if not counts.all():
        absent = np.flatnonzero(counts == 0)[:3].tolist()
        raise ConfigError(
            f"classes {absent} of {number} have no state among {int(counts.sum())}; give more "
            "words or a later reference"
        )
    means = (sums.T / counts).T.astype(np.float32)
    if not np.ptp(means, axis=0).any():
        raise ConfigError(
            f"all {number} classes have the same mean state: nothing tells them apart"
        )
    return means


def read_words(
    model: SequenceModel,
    words: np.ndarray,
    classes: np.ndarray,
    means: np.ndarray,
    places: Sequence[int],
    *,
    accuracy: float = 0.9,
    layer: int = 0,
) -> Reading:
    """Answers to words, read token by token, and what the states before some tokens have used.

    No word is to be one of those that the means are of.

    Args:
        model: whose layer looked at has a recurrent state.
        words: ``[N, T]`` ids, BOS first.
        classes: ``[N, T]``, after each token, which are also the answers; that of BOS is not looked
            at.
        means: ``[G, ...]``, the reference of each class.
        places: of the tokens before which states are looked at, ascending, from 2.
        accuracy: the part of the words that is to be right.
        layer: which block, from 0; the states of the others stay as they are.

    Raises:
        ConfigError: there is no such layer, it has no state of this kind, or words, classes or
            places are not as said.
    """
    require_accuracy(accuracy)
    words, classes = _checked(model, words, classes, len(means))
    _check_places(places, words.shape[1])
    state = _first_state(model, len(words), layer)
    graph, params = nnx.split(model)
    words_TN, classes_TN = (jnp.asarray(np.transpose(x), jnp.int32) for x in (words, classes))
    least = math.ceil(accuracy * len(words) - 1e-9)  # words that are to be right
    of = jnp.asarray(means)
    centre = jnp.broadcast_to(of.mean(0), (len(words), *of.shape[1:]))
    answers, read, margins = jnp.zeros(words_TN.shape, jnp.int32), 0, []
    for at in places:
        state, answers = _read_on(params, state, answers, words_TN, read, at, graph=graph)
        given = of[classes_TN[at - 1]], words_TN[at], classes_TN[at]
        seen = state[layer].recurrent
        for reached in (seen,) if margins else (centre, seen):
            found = _margin(params, state, reached, *given, graph=graph, layer=layer, least=least)
            margins.append(found)
        read = at
    _, answers = _read_on(params, state, answers, words_TN, read, len(words_TN), graph=graph)
    of_centre, *used = 1 / np.asarray(margins, np.float64)
    return Reading(np.asarray(answers == classes_TN).T, np.array(used), float(of_centre))


def _checked(
    model: SequenceModel, words: np.ndarray, classes: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Words as int32, and classes; ConfigError unless there are so many of each."""
    words = token_ids("words", words, "N T", model)
    if np.shape(classes) != words.shape or words.shape[1] < 2:
        raise ConfigError(
            f"words={list(words.shape)} and classes={list(np.shape(classes))} must both be [N, T], "
            "T at least 2"
        )
    classes = np.asarray(classes)
    numbers_below("classes", classes[:, 1:], "N T-1", number, "there are")
    return words, classes


def _check_places(places: Sequence[int], T: int) -> None:
    """ConfigError unless they ascend, from the second token to the last at most."""
    found = np.asarray(places)
    is_list = found.ndim == 1 and found.size and np.issubdtype(found.dtype, np.integer)
    if not (is_list and (np.diff(found) > 0).all() and found[0] >= 2 and found[-1] < T):
        raise ConfigError(f"places={found.tolist()} must ascend, from 2 to {T - 1} at most")


def _first_state(model: SequenceModel, N: int, layer: int) -> list:
    """The state before the first token; ConfigError unless that of the layer is one array."""
    if not 0 <= layer < len(model.layers):
        raise ConfigError(f"layer={layer} is not there; it may be 0 to {len(model.layers) - 1}")
    state = model.init_state(N)
    if not isinstance(getattr(state[layer], "recurrent", None), jax.Array):
        raise ConfigError(
            f"mixer={model.config.mixer!r} has no state that is one array; it may be any of the "
            "project's but transformer, mlstm and slstm"
        )
    return state


# Models of one kind share what is compiled, as of a sweep.
@functools.partial(jax.jit, static_argnames="graph")
def _read_on(
    params: nnx.State,
    state: list,
    answers: jax.Array,
    words_TN: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    graph: nnx.GraphDef,
) -> tuple[list, jax.Array]:
    """The state before token ``stop``, and the answers up to it, from those before ``start``."""

    def token(at: jax.Array, carry: tuple[list, jax.Array]) -> tuple[list, jax.Array]:
        state, answers = carry
        logits, state = nnx.merge(graph, params).step(state, words_TN[at])
        return state, answers.at[at].set(jnp.argmax(logits, axis=-1))

    return jax.lax.fori_loop(start, stop, token, (state, answers))


@functools.partial(jax.jit, static_argnames=("graph", "layer", "least"))
def _margin(
    params: nnx.State,
    state: list,
    reached: jax.Array,
    preserved: jax.Array,
    ids: jax.Array,
    right: jax.Array,
    graph: nnx.GraphDef,
    layer: int,
    least: int,
) -> jax.Array:
    """The factor of errors at which fewer than ``least`` of the answers to ``ids`` are right."""

    def holds(factor: jax.Array) -> jax.Array:
        entries = [*state]
        moved = preserved + factor * (reached - preserved)
        entries[layer] = entries[layer]._replace(recurrent=moved)
        logits, _ = nnx.merge(graph, params).step(entries, ids)
        return (jnp.argmax(logits, axis=-1) == right).sum() >= least

    return margin_of(holds)


def require_accuracy(accuracy: float) -> None:
    """Raises ConfigError unless the accuracy lies between 0 and 1, both left out."""
    if not 0 < accuracy < 1:
        raise ConfigError(f"accuracy={accuracy} must be between 0 and 1, both left out")


def fit_growth(since: np.ndarray, used: np.ndarray, centre: float) -> Growth:
    """The growth that the points are closest to, by the root mean square of their distance.

    Rates are tried on a logarithmic grid, twice; the floor follows from each in closed form.

    Args:
        since: tokens after the reference, positive.
        used: at each.
        centre: as in :class:`Reading`.

    Raises:
        ConfigError: there are fewer than three points.
    """
    if len(since) < 3:
        raise ConfigError(f"{len(since)} points are too few for a growth; there must be 3 or more")
    s, used = np.asarray(since, np.float64), np.asarray(used, np.float64)

    def best_of(rates: np.ndarray) -> Growth:
        grown = _grown(s, rates[:, None], centre)
        floors = np.maximum((used - grown).mean(1), 0)
        residuals = np.sqrt(((floors[:, None] + grown - used) ** 2).mean(1))
        best = residuals.argmin()
        return Growth(float(floors[best]), float(rates[best]), centre, float(residuals[best]))

    rates = np.logspace(-DECADES, 2, TRIED) / s.max()
    coarse = best_of(np.array([0.0, *rates]))
    return best_of(coarse.rate * (rates[1] / rates[0]) ** np.linspace(-1, 1, REFINED))


def failing_position(correct: np.ndarray, accuracy: float) -> int | None:
    """The first position, from 1, at which fewer than ``accuracy`` of the words are right.

    Args:
        correct: ``[N, T]``, whether each answer was right.
        accuracy: the least that holds.
    """
    below = np.flatnonzero(np.asarray(correct).mean(0) < accuracy)
    return int(below[0]) + 1 if len(below) else None
