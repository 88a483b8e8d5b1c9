"""Named tuples that a program saved by `jax.export` may take and return."""

from typing import TypeVar

import jax.export

Tuple = TypeVar("Tuple", bound=type)


def exported(kind: Tuple) -> Tuple:
    """``kind``, a named tuple, as a structure that `jax.export` saves under its name."""
    name = f"deltaproduct_jax.{kind.__name__}"
    jax.export.register_namedtuple_serialization(kind, serialized_name=name)
    return kind
