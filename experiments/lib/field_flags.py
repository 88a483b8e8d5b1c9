"""A flag of a field: its text to a value of the field's type, and a value to its text."""

import typing
from typing import Any

from absl import flags

from deltaproduct_jax.settings import is_union, spell


class FieldParser(flags.ArgumentParser):
    """Reads a flag's text as the type of its field: numbers, Optional, tuples as comma lists."""

    def __init__(self, annotation: Any):
        self.annotation = annotation
        self.syntactic_help = spell(annotation)

    def parse(self, argument: Any) -> Any:
        """The value, ValueError saying what it may be; defaults, which are no text, pass."""
        return value_of(argument, self.annotation) if isinstance(argument, str) else argument

    def flag_type(self) -> str:
        """The type as the help shows it."""
        return self.syntactic_help


class Boolean(flags.BooleanFlag):
    """A flag of a ``bool`` field: ``--name``, ``--noname``, or ``--name=false``."""

    class Parser(flags.BooleanParser):
        """Reads a bool."""

        may_be = "true or false"

        def parse(self, argument: Any) -> bool | None:
            """The value; ValueError saying what it may be."""
            try:
                return super().parse(argument)
            except ValueError:
                raise ValueError(f"it must be {self.may_be}") from None

    def __init__(self, name: str, default: bool | None, text: str, short_name: str | None = None):
        super().__init__(name, default, text, short_name=short_name)
        self.parser = type(self).Parser()


class OptionalBoolean(Boolean):
    """A flag of a ``bool | None`` field: it may also be ``--name=none``."""

    class Parser(Boolean.Parser):
        """Reads "none" as None, and the rest as a bool."""

        may_be = "true, false or none"

        def parse(self, argument: Any) -> bool | None:
            """The value; ValueError saying what it may be."""
            if isinstance(argument, str) and argument.lower() == "none":
                return None
            return super().parse(argument)


def value_of(text: str, annotation: Any) -> Any:
    """The value that a text stands for, ValueError saying what it may be."""
    options = options_of(annotation)
    if type(None) in options and text.lower() == "none":
        return None
    (kind,) = (option for option in options if option is not type(None))
    if kind == tuple[str, ...] and text and "" in text.split(","):  # as a path it would be "."
        raise ValueError(f"it must be {spell(annotation)}, without an empty entry")
    try:
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            return tuple(item(part) for part in text.split(",")) if text else ()
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"it must be {spell(annotation)}") from None


def options_of(annotation: Any) -> tuple[Any, ...]:
    """The types that a value may have, None's among them."""
    return typing.get_args(annotation) if is_union(annotation) else (annotation,)


def show(value: Any) -> str:
    """A default as one would write it on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
