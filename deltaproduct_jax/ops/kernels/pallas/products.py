"""Products inside the TPU kernel, by passes of the matrix unit, and the triangular inverse.

The unit multiplies bfloat16 and adds in float32. A float32 operand of one pass is rounded to
bfloat16; three passes split both operands into two bfloat16 parts and leave out the product of the
small ones, for an error of about 2^-16; six give float32.

Everything has a leading axis of heads that share nothing: a single head would be a chain of small
products that wait for each other, several fill the gaps of one another.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Diagonal blocks that are inverted by substitution on the vector unit.
BASE = 16


class Passes(NamedTuple):
    """How exactly to multiply, for inputs of one dtype.

    Attributes:
      large: passes of products with keys, values and states.
      inverse: of products within the triangular inverse.
      gates: of products with constants of zeros and ones, where the other operand is split.
      rounds: on a CPU, which has no passes, a product of one pass rounds its operands first.
    """

    large: int
    inverse: int
    gates: int
    rounds: bool

    @classmethod
    def of(cls, dtype: jnp.dtype, precision: str | None, interpret: bool) -> "Passes":
        """The rule of `Matmul.of` and `Matmul.of_inverse_and_gates`."""
        if dtype == jnp.bfloat16 and precision in (None, "default"):
            return cls(1, 3, 3, rounds=interpret)
        passes = {"default": 1, "high": 3}.get(precision, 6)
        return cls(passes, passes, 6, rounds=False)

    def __call__(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """A large product, in float32."""
        return self._product(equation, x, y, self.large)

    def in_two_passes(self, equation: str, inverse: jax.Array, y: jax.Array) -> jax.Array:
        """A large product with the triangular inverse, of which one pass takes two terms.

        Rounded once, its errors along a row have one sign where keys are equal, and with beta near
        2 the state never takes them back; an error of y acts like one of a value, which is
        forgotten.
        """
        if self.large != 1:
            return self(equation, inverse, y)
        high, low = self._split(inverse)
        return self(equation, high, y) + self(equation, low, y)

    def within_inverse(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """A product of parts of the triangular inverse."""
        return self._product(equation, x, y, self.inverse)

    def over_gates(self, equation: str, x: jax.Array, ones: jax.Array) -> jax.Array:
        """A sum of the entries of ``x`` that ``ones``, zeros and ones, picks."""
        if self.gates == 6:
            return _einsum(equation, x, ones, jax.lax.Precision.HIGHEST)
        high, low = self._split(x)
        return _einsum(equation, high, ones) + _einsum(equation, low, ones)

    def _product(self, equation, x, y, passes):
        if passes == 6:
            return _einsum(equation, x, y, jax.lax.Precision.HIGHEST)
        if passes == 3:
            (x, small_x), (y, small_y) = self._split(x), self._split(y)
            small = _einsum(equation, x, small_y) + _einsum(equation, small_x, y)
            return _einsum(equation, x, y) + small
        if self.rounds:
            x, y = self._rounded(x), self._rounded(y)
        return _einsum(equation, x, y)

    def _rounded(self, x):
        if self.rounds:  # XLA takes a conversion there and back as none
            return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    def _split(self, x):
        high = self._rounded(x)
        return high, x - high


def _einsum(equation, x, y, precision=jax.lax.Precision.DEFAULT):
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Positions along an axis; a kernel captures no constant arrays."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def column_of(row: jax.Array) -> jax.Array:
    """[h, 1, M] as [h, M, 1], exactly."""
    M = row.shape[-1]
    diagonal = iota((1, M, M), 1) == iota((1, M, M), 2)
    return jnp.sum(jnp.where(diagonal, row, 0), axis=-1, keepdims=True)


def row_of(column: jax.Array) -> jax.Array:
    """[h, M, 1] as [h, 1, M], exactly."""
    M = column.shape[-2]
    diagonal = iota((1, M, M), 1) == iota((1, M, M), 2)
    return jnp.sum(jnp.where(diagonal, column, 0), axis=-2, keepdims=True)


def unit_lower_inverse(lower: jax.Array, passes: Passes) -> jax.Array:
    """(I + lower)^-1 as in triangular.py, by masked doubling, but from blocks of 16 on.

    Those of the diagonal come from substitution on the vector unit: all of them side by side, a
    column at a time. A level of the doubling changes only the lower half of every block, so half of
    the rows take part in its products.

    Args:
      lower: [h, M, M] float32, strictly lower triangular; M a multiple of 16.
      passes: rule for the products.
    """
    M = lower.shape[-1]
    starts = range(0, M, BASE)
    lane = iota((1, BASE, M), 2)
    packed = sum(
        jnp.where((lane >= s) & (lane < s + BASE), lower[:, s : s + BASE], 0) for s in starts
    )
    inverse = _substitute(packed)
    row, column = iota((1, M, M), 1), iota((1, M, M), 2)
    same_block = row // BASE == column // BASE
    inverse = jnp.where(same_block, jnp.concatenate([inverse] * len(starts), axis=1), 0)
    width = BASE
    while width < M:
        quarter = (row // (2 * width) == column // (2 * width)) & (row // width != column // width)
        correction = jnp.where(quarter, lower, 0)
        blocks = [inverse[:, s : min(s + width, M)] for s in range(0, M, width)]
        odd = jnp.concatenate(blocks[1::2], axis=1)
        correction = passes.within_inverse("hmn,hnl->hml", odd, correction)
        correction = passes.within_inverse("hmn,hnl->hml", correction, inverse)
        odd, at = odd - correction, 0
        for i in range(1, len(blocks), 2):
            size = blocks[i].shape[1]
            blocks[i], at = odd[:, at : at + size], at + size
        inverse = jnp.concatenate(blocks, axis=1)
        width *= 2
    return inverse


def _substitute(packed: jax.Array) -> jax.Array:
    """Inverses of I + L for blocks L side by side, [h, 16, M], by columns of L."""
    h, _, M = packed.shape
    lane = iota((h * BASE, M), 1)
    packed = packed.reshape(h * BASE, M)
    solved = (iota((h, BASE, M), 2) % BASE == iota((h, BASE, M), 1)).astype(jnp.float32)
    for j in range(BASE - 1):
        column = jnp.take_along_axis(packed, lane // BASE * BASE + j, axis=1)
        solved -= column.reshape(h, BASE, M) * solved[:, j : j + 1]
    return solved
