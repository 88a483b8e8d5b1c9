"""The two errors that a command turns into one line; any other is a bug and keeps its traceback."""

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class _OneLine:
    """Text of one line, whatever names and words of other programs are in it."""

    def __str__(self) -> str:
        return " ".join(filter(None, map(str.strip, super().__str__().splitlines())))


class ConfigError(_OneLine, ValueError):
    """A setting that cannot be honoured; the text names it, what it got and what it may be."""


class RunDirectoryError(_OneLine, OSError):
    """A run directory that cannot be written or read, or holds another run."""


def found_module(name: str) -> ModuleType | None:
    """The module of a dotted name; None where there is none.

    Raises:
        ImportError: it is there, and something that it needs is not.
    """
    try:
        is_name = all(part.isidentifier() for part in name.split("."))
        return importlib.import_module(name) if is_name else None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        return None


def require_package(name: str, what: str, extra: str) -> ModuleType:
    """A module of a package that only some work needs, imported where it is used.

    Args:
        name: of the module.
        what: the work, for the error.
        extra: of this package, that brings it.

    Raises:
        ConfigError: it is not installed; the text says how to.
    """
    module = found_module(name)
    if module is None:
        root = name.partition(".")[0]
        raise ConfigError(
            f"{what} needs the package {root}; pip install 'deltaproduct_jax[{extra}]' installs it"
        )
    return module


def require_one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises ConfigError unless ``value`` is one of ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not known; it may be one of {allowed}")


def require_name(what: str, name: Any) -> None:
    """Raises ConfigError unless ``name`` is one that a flag can say."""
    if not (isinstance(name, str) and name and name == name.strip() and name.isprintable()):
        raise ConfigError(f"the name of a {what} must be a text of its own, got {name!r}")


def require_at_least(name: str, value: float, minimum: float) -> None:
    """Raises ConfigError unless ``value >= minimum``."""
    if not value >= minimum:
        raise ConfigError(f"{name}={value!r} is too small; it must be at least {minimum}")


def require_ascending(name: str, values: tuple[int, ...]) -> None:
    """Raises ConfigError unless there are ``values``, each larger than the one before it."""
    if not values or sorted(set(values)) != list(values):
        raise ConfigError(f"{name}={values!r} must ascend, with one length at least")


def refuse_taken(what: str, name: str, new: type, old: type | None) -> None:
    """Raises ConfigError if a name stands for another class; the same may come again, reloaded."""
    path = lambda kind: f"{kind.__module__}.{kind.__qualname__}"
    if old is not None and path(new) != path(old):
        raise ConfigError(f"{what}={name!r} is taken by {path(old)}; give {path(new)} another name")
