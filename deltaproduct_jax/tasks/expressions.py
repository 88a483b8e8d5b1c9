"""Arithmetic modulo 5: expressions drawn at random, as tokens together with their value.

Both generators are those of the formal-language tasks of Beck et al., "xLSTM",
https://arxiv.org/abs/2405.04517 (without brackets), and Delétang et al., "Neural Networks and the
Chomsky Hierarchy", https://arxiv.org/abs/2207.02098 (with brackets), in the versions and with the
token ids of Grazzi et al., https://arxiv.org/abs/2411.12537.

Dimension key: ``B`` expressions, ``N`` operands of one, ``E`` tokens of the longest expression.
"""

import jax
import jax.numpy as jnp

MODULUS = 5
PLUS, MINUS, TIMES = range(3)

# What begins at a position of an expression in brackets: an expression of so many tokens, nothing
# (it is over), one of the operators, or a closing bracket.
NOTHING, CLOSING = 0, -4
OPERATOR = -1  # less 0, 1, 2 for + - *
SHORTEST_JOINT = 5  # tokens of the shortest (L op R)


class FlatTokens:
    """Token ids of expressions without brackets."""

    PAD, EQUALS = 0, 4
    OPERATORS = 1  # of +, then -, then *
    DIGITS = 5
    VOCAB_SIZE = DIGITS + MODULUS


class BracketTokens:
    """Token ids of expressions in brackets."""

    DIGITS = 0
    OPERATORS = MODULUS  # of +, then -, then *
    OPENING, CLOSING, EQUALS, PAD = range(MODULUS + 3, MODULUS + 7)
    VOCAB_SIZE = PAD + 1


def draw_flat(
    key: jax.Array, operands_B: jax.Array, max_operands: int
) -> tuple[jax.Array, jax.Array]:
    """Draws ``digit op digit op .. digit``, every digit and every one of + - * equally likely.

    Args:
        key: the only source of chance.
        operands_B: number of digits of each expression, 1 to ``max_operands``.
        max_operands: N, static.

    Returns:
        Token ids ``[B, 2 N - 1]``, padded, and the values ``[B]``; * binds tighter than + and -.
    """
    digit_key, operator_key = jax.random.split(key)
    shape = (operands_B.size, max_operands)
    digits_BN = jax.random.randint(digit_key, shape, 0, MODULUS, jnp.int32)
    # The one after each digit.
    operators_BN = jax.random.randint(operator_key, shape, 0, 3, jnp.int32)
    tokens = jnp.stack(
        [digits_BN + FlatTokens.DIGITS, operators_BN + FlatTokens.OPERATORS], axis=-1
    )
    tokens_BE = tokens.reshape(operands_B.size, -1)[:, :-1]
    inside_BE = (
        jnp.arange(2 * max_operands - 1, dtype=jnp.int32)[None, :] < 2 * operands_B[:, None] - 1
    )
    values_BN = flat_values(digits_BN, operators_BN)
    values_B = jnp.take_along_axis(values_BN, operands_B[:, None] - 1, axis=1)[:, 0]
    return jnp.where(inside_BE, tokens_BE, FlatTokens.PAD), values_B


def flat_values(digits_BN: jax.Array, operators_BN: jax.Array) -> jax.Array:
    """Values ``[B, N]`` of the first 1, 2, .. N digits, joined by the operators after each."""

    def read(state: tuple[jax.Array, jax.Array], entry: tuple[jax.Array, jax.Array]):
        total_B, term_B = state  # the value is their sum; only the term may still be multiplied
        digit_B, operator_B = entry
        multiplies_B = operator_B == TIMES
        total_B = jnp.where(multiplies_B, total_B, total_B + term_B) % MODULUS
        factor_B = jnp.where(multiplies_B, term_B, jnp.where(operator_B == MINUS, -1, 1))
        term_B = factor_B * digit_B % MODULUS
        return (total_B, term_B), (total_B + term_B) % MODULUS

    before_BN = jnp.pad(operators_BN[:, :-1], ((0, 0), (1, 0)), constant_values=PLUS)
    zeros_B = jnp.zeros_like(digits_BN[:, 0])
    return jax.lax.scan(read, (zeros_B, zeros_B), (digits_BN.T, before_BN.T))[1].T


def draw_bracketed(
    key: jax.Array, lengths_B: jax.Array, max_length: int, *, multiplication: bool
) -> tuple[jax.Array, jax.Array]:
    """Draws expressions of exactly the lengths wanted, by the recursive rule

    ``d``, ``-d``, ``(d)``, ``(-d)`` at lengths 1 to 4, and beyond ``(L op R)``, where the length of
    L is uniform over 1 .. length - 4 and R takes the rest.

    An expression of known length that begins at a known position tells where its parts begin and
    how long they are, so that one pass from left to right writes all tokens, without a stack, and
    one from right to left finds the values.

    Args:
        key: the only source of chance.
        lengths_B: tokens of each expression, 1 to ``max_length``.
        max_length: E, static.
        multiplication: whether * is drawn as well as + and -, each as often.

    Returns:
        Token ids ``[B, E]``, padded, and the values ``[B]``.
    """
    digit_key, operator_key, left_key = jax.random.split(key, 3)
    shape = (lengths_B.size, max_length)
    digits_BE = jax.random.randint(digit_key, shape, 0, MODULUS, jnp.int32)
    kinds = 3 if multiplication else 2
    operators_BE = jax.random.randint(operator_key, shape, 0, kinds, jnp.int32)
    left_bits_BE = jax.random.bits(left_key, shape, jnp.uint32)
    begins_BE, lefts_BE = jax.vmap(_plan)(lengths_B, left_bits_BE, operators_BE)
    tokens_BE = jnp.select(
        [
            begins_BE == NOTHING,
            begins_BE == CLOSING,
            begins_BE < NOTHING,
            begins_BE == 1,
            begins_BE == 2,
        ],
        [
            BracketTokens.PAD,
            BracketTokens.CLOSING,
            BracketTokens.OPERATORS + OPERATOR - begins_BE,
            BracketTokens.DIGITS + digits_BE,
            BracketTokens.OPERATORS + MINUS,
        ],
        BracketTokens.OPENING,
    )
    return tokens_BE, jax.vmap(_bracketed_value)(begins_BE, lefts_BE, digits_BE)


def _plan(
    length: jax.Array, left_bits_E: jax.Array, operators_E: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What begins at each position, and the length of what an expression there holds first."""
    positions_E = jnp.arange(left_bits_E.size, dtype=jnp.int32)

    def place(begins_E: jax.Array, entry: tuple[jax.Array, ...]):
        position, left_bits, operator = entry
        offset_E, length = positions_E - position, begins_E[position]
        joins = length >= SHORTEST_JOINT
        # The remainder of 32 random bits: uniform but for 1 part in 2**24.
        left = 1 + (left_bits % jnp.maximum(length - 4, 1).astype(jnp.uint32)).astype(jnp.int32)
        first = jnp.where(joins, left, jnp.where(length == 2, 1, length - 2))
        begins_E = jnp.where((offset_E == 1) & (length >= 2), first, begins_E)
        begins_E = jnp.where((offset_E == length - 1) & (length >= 3), CLOSING, begins_E)
        begins_E = jnp.where((offset_E == left + 1) & joins, OPERATOR - operator, begins_E)
        begins_E = jnp.where((offset_E == left + 2) & joins, length - left - 3, begins_E)
        return begins_E, first

    begins_E = jnp.where(positions_E == 0, length, NOTHING)
    return jax.lax.scan(place, begins_E, (positions_E, left_bits_E, operators_E))


def _bracketed_value(begins_E: jax.Array, lefts_E: jax.Array, digits_E: jax.Array) -> jax.Array:
    """The value of the whole expression, from the values of its parts."""
    last = begins_E.size - 1

    def find(values_E: jax.Array, position: jax.Array):
        length, left = begins_E[position], lefts_E[position]
        first = values_E[jnp.minimum(position + 1, last)]
        second = values_E[jnp.minimum(position + 2 + left, last)]
        operator = OPERATOR - begins_E[jnp.minimum(position + 1 + left, last)]
        joint = jnp.select(
            [operator == PLUS, operator == MINUS], [first + second, first - second], first * second
        )
        value = jnp.select(
            [length == 1, length == 2, length < SHORTEST_JOINT],
            [digits_E[position], -first, first],
            joint,
        )
        return values_E.at[position].set(value % MODULUS), None

    positions_E = jnp.arange(last, -1, -1, dtype=jnp.int32)
    return jax.lax.scan(find, jnp.zeros_like(digits_E), positions_E)[0][0]
