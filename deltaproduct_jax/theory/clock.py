"""Counting tokens modulo P: with n_h >= 2 in one layer, with n_h = 1 in two.

Exactly, wherever keys can be exact. Two reflections turn by twice the angle between their keys. The
cosine c of unit keys that a binary float holds is a dyadic fraction, so the turn's, 2 c^2 - 1, is
rational, which leaves orders 1, 2, 3, 4 and 6 (Niven); 4 and 6 would need c = sqrt(1/2) and
sqrt(3/4). So one layer counts modulo 2, 3, and 6 (by both at once) without drift, and not modulo 4
or 8. For the same reason no n_h = 2 tracks S4 by exact arithmetic: its letters have order 4. With
n_h = 1 the first layer tells odd tokens from even ones and the second alternates two
reflections, which needs keys at 90 degrees for P = 4 and at 60 for P = 6, both exact.

What is left drifts in length: two reflections whose keys are an ulp too long, as looked up in
float32, turn by the right angle up to the square of that error, but change the length of what they
turn by about 1e-7 at every token, a tenth after a million. Hence only signs are read.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from deltaproduct_jax.theory.program import Program, Table
from deltaproduct_jax.theory.reflections import completion, factors
from deltaproduct_jax.theory.representations import plane_rotation

# All orders of three numbers are told apart by the signs of their differences.
ORDERED = np.array([-1.0, 0, 1])
DIFFERENCES = np.array([[1.0, -1, 0], [0, 1, -1], [1, 0, -1]])


@dataclasses.dataclass(frozen=True, eq=False)
class Hand:
    """One orbit of a clock: at token t, counted from 1, ``turns[t % len(turns)]`` acts on it.

    What is read is its sign on each of ``lines [h, d]``, which none of its positions is close to.
    """

    turns: Sequence[np.ndarray]
    start: np.ndarray
    copies: int
    pads: Sequence[float]
    lines: np.ndarray

    def positions(self, P: int) -> np.ndarray:
        """Signs ``[P, h]`` after 0 to P - 1 tokens."""
        found = [self.start]
        for t in range(1, P):
            found.append(self.turns[t % len(self.turns)] @ found[-1])
        return np.sign(np.array(found) @ self.lines.T)


@dataclasses.dataclass(frozen=True, eq=False)
class Clock:
    """Writes the feature "clock" ``[P]``, 1 at the number of tokens so far modulo P."""

    period: int
    hands: Sequence[Hand]

    @property
    def num_layers(self) -> int:
        """Layers that it takes."""
        return len(self.hands[0].turns)

    @property
    def features(self) -> dict[str, int]:
        """Those that it needs, "clock" itself left out."""
        widths = {"phase": self.num_heads}
        if self.num_layers == 1:
            return widths
        return {"parity": 1, "turn": len(self.hands[0].start), **widths}

    @property
    def num_heads(self) -> int:
        """Heads of its layers."""
        return sum(len(hand.lines) for hand in self.hands)

    @property
    def energy(self) -> int:
        """Square sum, in units, of what its mixers write."""
        return self.num_heads + self.num_layers - 1

    @property
    def head_dim(self) -> int:
        """Key width that it needs."""
        return max(hand.copies * len(hand.start) + len(hand.pads) for hand in self.hands)

    def write(self, program: Program, letters: np.ndarray) -> None:
        """Into the first layers of a program."""
        layer = self.num_layers - 1
        if layer:
            self._alternate(program, letters)
        first = 0
        for hand in self.hands:
            heads = slice(first, first + len(hand.lines))
            if not layer:
                keys, beta = factors(hand.turns[0], program.R)
                every = [np.broadcast_to(a, (len(letters), *a.shape)) for a in (keys, beta)]
                program.factors(0, heads, "token", *every, hand.copies, rows=letters)
            program.read(layer, heads, "token", hand.lines[None], hand.copies)
            key = (hand.start, hand.pads, hand.copies)
            program.orbit(layer, heads, "phase", *key, at=first, signs=True)
            first = heads.stop
        phases = np.concatenate([hand.positions(self.period) for hand in self.hands], axis=1)
        products = phases @ phases.T
        others = products[~np.eye(self.period, dtype=bool)]
        ticks = {"clock": np.eye(self.period)}
        program.lookup(layer, Table({"phase": phases}, products[0, 0], others.max(), ticks))

    def _alternate(self, program: Program, letters: np.ndarray) -> None:
        """A first layer that has the key of the even or odd token for the second."""
        (hand,) = self.hands
        one, every = slice(0, 1), (np.ones((len(letters), 1, 1)), np.full((len(letters), 1), 2.0))
        program.factors(0, one, "token", *every, 1, rows=letters)
        program.read(0, one, "token", np.ones((1, 1, 1)), 1)
        program.orbit(0, one, "parity", np.ones(1), [], 1)
        keys = np.array([factors(turn, 1)[0][0] for turn in hand.turns])
        program.lookup(0, Table({"parity": np.array([[1.0], [-1.0]])}, 1, -1, {"turn": keys}))
        program.factors_of_feature(1, slice(0, self.num_heads), "turn", None, hand.copies)


def make_clock(period: int, num_householder: int) -> Clock:
    """A clock of an even period, exact wherever it can be."""
    if num_householder == 1:
        return Clock(period, [_alternating(period)])
    if period == 2:
        return Clock(period, [_flip()])
    if period == 6:
        cycle = np.eye(3)[[1, 2, 0]]
        return Clock(period, [_flip(), Hand([cycle], ORDERED, 2, [], DIFFERENCES)])
    turn = plane_rotation(2 * np.pi / period)
    return Clock(period, [Hand([turn], _between(period), 1, [], _lines(period))])


def _flip() -> Hand:
    return Hand([-np.eye(1)], np.ones(1), 1, [], np.eye(1))


def _alternating(period: int) -> Hand:
    """Two reflections in turn; keys at an angle of a full turn over P, images evenly spaced."""
    if period == 6:
        swaps = [np.eye(3)[[0, 2, 1]], np.eye(3)[[1, 0, 2]]]
        return Hand(swaps, ORDERED, 2, [], DIFFERENCES)
    if period == 4:
        flips = [np.diag([1.0, -1.0]), np.diag([-1.0, 1.0])]
        return Hand(flips, np.ones(2), 1, completion(2), np.eye(2))
    angles = np.array([2 * np.pi / period, 0])  # of even tokens' keys, of odd ones'
    keys = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    turns = [np.eye(2) - 2 * np.outer(key, key) for key in keys]
    return Hand(turns, _between(period), 1, [], _lines(period))


def _lines(period: int) -> np.ndarray:
    """Half of P lines ``[P / 2, 2]``, which tell P evenly spaced vectors apart."""
    angles = 2 * np.pi / period * np.arange(period // 2)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _between(period: int) -> np.ndarray:
    """A unit vector ``[2]`` as far from being orthogonal to every one of `_lines` as can be."""
    angle = np.pi / 2 - np.pi / period
    return np.array([np.cos(angle), np.sin(angle)])
