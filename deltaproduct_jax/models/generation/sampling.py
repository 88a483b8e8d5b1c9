"""Which token comes next: pure functions of logits, of settings and of a key.

Dimension key: ``B`` rows, ``V`` token ids.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from deltaproduct_jax.settings import check_fields, setting


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the filters apply in the order of the fields.

    Raises:
        ConfigError: naming the field, when a value is out of range.
    """

    temperature: float = setting(1.0, "divides the logits; 0 takes the likeliest token", least=0)
    top_k: int | None = setting(None, "only so many of the likeliest tokens; none: all", least=1)
    top_p: float = setting(
        1.0,
        "only the fewest of the likeliest tokens whose probabilities reach this sum",
        above=0,
        most=1,
    )
    min_p: float = setting(
        0.0, "only tokens that have this share of the likeliest's probability", least=0, most=1
    )

    def __post_init__(self) -> None:
        """Checks every field against its range."""
        check_fields(self)


PLAIN = Sampling()


class Rules(NamedTuple):
    """:class:`Sampling` of every row, in arrays, so that other values need no other program."""

    temperature: Float[Array | np.ndarray, " B"]
    top_k: Int[Array | np.ndarray, " B"]
    top_p: Float[Array | np.ndarray, " B"]
    min_p: Float[Array | np.ndarray, " B"]


class Needs(NamedTuple):
    """What some row of a program asks for; what none does is left out of it."""

    draws: bool
    sorts: bool


ALL = Needs(draws=True, sorts=True)


def rules_of(samplings: Sequence[Sampling], vocab_size: int) -> Rules:
    """The arrays of several rows' settings."""
    return Rules(
        np.asarray([s.temperature for s in samplings], np.float32),
        np.asarray([min(s.top_k or vocab_size, vocab_size) for s in samplings], np.int32),
        np.asarray([s.top_p for s in samplings], np.float32),
        np.asarray([s.min_p for s in samplings], np.float32),
    )


def needs_of(samplings: Sequence[Sampling]) -> Needs:
    """What these rows ask for together."""
    drawing = [s for s in samplings if s.temperature > 0]
    return Needs(bool(drawing), any(s.top_k is not None or s.top_p < 1 for s in drawing))


def row_keys(
    key: Key[Array, ""], own: Integer[Array, " B"], position: Int[Array, " B"]
) -> Key[Array, " B"]:
    """A key for every row's next token, of nothing but the seed's, the row's own, and its place."""
    fold = lambda own, position: jax.random.fold_in(jax.random.fold_in(key, own), position)
    return jax.vmap(fold)(own, position)


def likely(
    logits: Float[Array, "B V"], rules: Rules, *, sorts: bool = True
) -> tuple[Float[Array, "B V"], Bool[Array, "B V"]]:
    """Logits by the temperature, in float32, and which tokens may be drawn.

    Of tokens that are equally likely the smaller ids come first. ``top_p`` is of the probabilities
    that ``top_k`` leaves, renormalised. One token is left at least.

    Args:
        logits: of every token.
        rules: settings by row; a temperature of 0 counts as 1 here.
        sorts: False where no row has a ``top_k`` or ``top_p``.
    """
    rules = Rules(*map(jnp.asarray, rules))
    temperature = jnp.where(rules.temperature > 0, rules.temperature, 1)
    scaled = logits.astype(jnp.float32) / temperature[:, None]
    # log(0) is -inf, and allows all.
    least = jnp.max(scaled, axis=1) + jnp.log(rules.min_p)
    kept = scaled >= least[:, None]
    return scaled, kept & _largest(scaled, rules) if sorts else kept


def _largest(scaled_BV: jax.Array, rules: Rules) -> jax.Array:
    """Whether a token is among the likeliest that ``top_k`` and ``top_p`` leave."""
    # Values alone are sorted, not their ids: that takes a third of the time.
    ordered_BV = -jnp.sort(-scaled_BV, axis=1)
    in_k_BV = jnp.arange(scaled_BV.shape[1], dtype=jnp.int32)[None] < rules.top_k[:, None]
    p_BV = jax.nn.softmax(jnp.where(in_k_BV, ordered_BV, -jnp.inf), axis=1)
    before_BV = jnp.cumsum(p_BV, axis=1) - p_BV
    # Rounded, the sum may reach 1 before the last token: 1 has to mean all.
    in_p_BV = (before_BV < rules.top_p[:, None]) | (rules.top_p[:, None] >= 1)
    count_B1 = jnp.maximum(jnp.sum(in_k_BV & in_p_BV, axis=1, keepdims=True), 1)
    last_B1 = jnp.take_along_axis(ordered_BV, count_B1 - 1, axis=1)
    above_BV, equal_BV = scaled_BV > last_B1, scaled_BV == last_B1
    room_B1 = count_B1 - jnp.sum(above_BV, axis=1, keepdims=True)
    return above_BV | (equal_BV & (jnp.cumsum(equal_BV, axis=1) <= room_B1))


def probabilities(logits: Float[Array, "B V"], rules: Rules) -> Float[Array, "B V"]:
    """With which probability :func:`draw` returns a token; float32."""
    scaled, kept = likely(logits, rules)
    best = jax.nn.one_hot(jnp.argmax(logits, axis=1), logits.shape[1])
    drawn = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf), axis=1)
    return jnp.where(jnp.asarray(rules.temperature)[:, None] > 0, drawn, best)


def draw(
    keys: Key[Array, " B"],
    logits: Float[Array, "B V"],
    rules: Rules,
    needs: Needs = ALL,
) -> Int[Array, " B"]:
    """A token for every row, int32; -1 where a logit is NaN or all are infinite.

    Args:
        keys: of each row.
        logits: of every token.
        rules: settings by row.
        needs: what the rows ask for.
    """
    tokens = jnp.argmax(logits, axis=1)
    if needs.draws:
        scaled, kept = likely(logits, rules, sorts=needs.sorts)
        # The largest of logits with Gumbel noise is a draw from their softmax. The noise is a
        # token's own, whatever the others are: rounding then changes a draw only in a near tie.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        drawn = jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=1)
        tokens = jnp.where(jnp.asarray(rules.temperature) > 0, drawn, tokens)
    # On a CPU a maximum may overlook NaN (ops/containment.py).
    is_sound = jnp.isfinite(jnp.max(logits, axis=1)) & ~jnp.any(jnp.isnan(logits), axis=1)
    return jnp.where(is_sound, tokens, -1).astype(jnp.int32)
