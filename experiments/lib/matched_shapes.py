"""Shapes of a mixer with as many parameters whatever the number of factors, as the paper has them.

The projections of a block to q, to R keys and R values, and back take ``(2 + 2 R) D H K``
parameters, so that with R factors the heads, or their width, shrink by ``4 / (2 + 2 R)``: 8, 5.3
and 4 heads of 128, or 8 heads of 128, 85 and 64.

Dimension key: ``D`` model width, ``R`` factors, ``H`` heads, ``K`` their width.
"""

import dataclasses
import re

from deltaproduct_jax.errors import ConfigError

# What gives way when there are more factors.
WAYS = ("heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A mixer's sizes, by the names of its fields."""

    num_householder: int
    num_heads: int
    head_dim: int

    @classmethod
    def of_text(cls, name: str, text: str) -> "Shape":
        """Of "RxHxK"; ConfigError, naming the flag, if it is none."""
        return cls(*sizes_of(name, text, 3))

    def with_factors(self, factors: int, way: str) -> "Shape":
        """The shape with so many factors and about as many parameters, of one with a single factor.

        Args:
            factors: R.
            way: of `WAYS`, what becomes fewer or narrower.
        """
        share = 4 / (2 + 2 * factors)
        if way == "heads":
            return Shape(factors, max(1, round(self.num_heads * share)), self.head_dim)
        return Shape(factors, self.num_heads, max(1, round(self.head_dim * share)))


def sizes_of(name: str, text: str, count: int) -> list[int]:
    """The numbers of a text such as "2x8x128"; ConfigError, naming the flag, if they are not so."""
    if not re.fullmatch("x".join([r"[1-9]\d{0,8}"] * count), text):
        raise ConfigError(f"{name}={text!r} must be {count} whole numbers, as in 2x8x128")
    return [int(number) for number in text.split("x")]
