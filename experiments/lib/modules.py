"""Modules that a record or a flag names."""

import importlib
import types

from deltaproduct_jax.errors import is_module_name


def found_module(name: str) -> types.ModuleType | None:
    """The module of a dotted name; None where there is none.

    Raises:
        ImportError: it is there, and something that it needs is not.
    """
    try:
        return importlib.import_module(name) if is_module_name(name) else None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        return None
