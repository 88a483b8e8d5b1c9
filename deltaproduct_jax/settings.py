"""Fields of configurations: a default, the sentence that explains it, and what a value may be.

What is wrong with a value is told by :func:`misfit`, for fields of dataclasses and for what is read
from files (``files.py``) alike: a whole number is no fraction and no truth, a number is finite.
"""

import dataclasses
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

import jax
import numpy as np

from deltaproduct_jax.errors import ConfigError

SHOWN = 60  # characters of a value in an error
LARGEST_SEED = 2**63 - 1  # that JAX and NumPy both take
LARGEST_COUNT = 2**31 - 1  # that a device counts to
# What arrays hold, of the dtype that most have: what is larger would be inf there, what is smaller
# nothing, and an epsilon then none.
LARGEST_FLOAT, SMALLEST_FLOAT = (float(x) for x in (np.finfo("f4").max, np.finfo("f4").tiny))


def setting(
    default: Any,
    help: str,
    *,
    repeated: bool = False,
    recorded_if_set: bool = False,
    filled: bool = False,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    one_of: Collection[Any] | None = None,
) -> Any:
    """A dataclass field whose ``help`` becomes the text of its flag.

    Args:
        default: of the field.
        help: a sentence without its full stop.
        repeated: for a tuple of texts: the flag may be given several times, an entry each.
        recorded_if_set: a record leaves the field out where it has its default, as records do that
            are older than the field.
        filled: `check_fields` refuses a list without entries.
        least: `check_fields` refuses a value, or an entry of a list, below it.
        above: the same of one that is not above it.
        most: the same of one beyond it.
        one_of: the same of one that is not among these, which plug-ins may add to; None passes.
    """
    metadata = {"help": help, "repeated": repeated, "recorded_if_set": recorded_if_set}
    metadata |= {"filled": filled, "least": least, "above": above, "most": most, "one_of": one_of}
    return dataclasses.field(default=default, metadata=metadata)


def seed_setting(help: str) -> Any:
    """The field of a seed: a whole number that every generator takes."""
    return setting(0, help, least=0, most=LARGEST_SEED)


def make_key(seed: int) -> jax.Array:
    """A key of a seed, of the same generator whatever JAX's default is.

    Others draw other numbers, and mapped over keys not those that each key draws by itself. Whoever
    draws with it does so inside ``jax.threefry_partitionable(True)``, the other flag that numbers
    depend on.
    """
    return jax.random.key(seed, impl="threefry2x32")


def require_settings(name: str, kind: Any, needed: Iterable[str] = ()) -> None:
    """Raises ConfigError unless ``kind`` is a frozen dataclass of settings that has what it needs.

    Args:
        name: of what is looked at, to begin the text with.
        kind: a class whose fields are to become flags.
        needed: attributes that it must have.
    """
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigError(f"{name}={shown(kind)} must be a dataclass")
    if not kind.__dataclass_params__.frozen:
        raise ConfigError(f"{name}={shown(kind)} must be a frozen dataclass")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    bare = [each for each, field in fields.items() if "help" not in field.metadata]
    if bare:
        raise ConfigError(f"{name}={shown(kind)} must have a setting for {', '.join(bare)}")
    missing = [each for each in needed if each not in fields and not hasattr(kind, each)]
    if missing:
        raise ConfigError(f"{name}={shown(kind)} must have {', '.join(missing)}")


def recorded(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that a record of it has, with their values."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not (
            field.metadata.get("recorded_if_set") and getattr(config, field.name) == field.default
        )
    }


def check_fields(config: Any) -> None:
    """Raises ConfigError, naming it, if a field of a dataclass holds what its annotation excludes.

    So it does for what the bounds of its `setting` exclude. What is left is kept as the annotation
    has it: a list as a tuple, a number or text of NumPy's as Python's, a whole number for a float
    as a float. So a configuration is hashable, equals what its record is read as, and no later
    check or program meets another kind. Configurations call it first in ``__post_init__``.
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        problem = misfit(value, hints[field.name], field.name)
        if problem is None:
            value = kept(value, hints[field.name])
            problem = _outside(value, field.metadata, field.name)
        if problem is not None:
            raise ConfigError(problem)
        object.__setattr__(config, field.name, value)


def kept(value: Any, annotation: Any) -> Any:
    """A value that fits an annotation, as its very kind: a number of NumPy's as Python's."""
    if is_union(annotation):
        fits = [part for part in typing.get_args(annotation) if misfit(value, part, "") is None]
        return kept(value, fits[0])
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        return tuple(kept(entry, item) for entry in value)
    if annotation is str:
        return str.__str__(value)  # str() of an enum's member is its name
    return annotation(value) if annotation in (int, float, bool) else value


def _outside(value: Any, metadata: Mapping[str, Any], name: str) -> str | None:
    """Which bound of its `setting` a value, or an entry of it, does not keep, or None."""
    if metadata.get("filled") and not value:
        return f"{name} is empty; give one entry at least ({metadata['help']})"
    entries = value if type(value) is tuple else () if value is None else (value,)
    found = (_entry_outside(entry, metadata, name) for entry in entries)
    return next(filter(None, found), None)


def _entry_outside(value: Any, metadata: Mapping[str, Any], name: str) -> str | None:
    least, above, most = (metadata.get(bound) for bound in ("least", "above", "most"))
    if most is None and isinstance(value, int):
        most = LARGEST_SEED  # no array has more entries, and none holds a larger number
    if isinstance(value, float) and (problem := unheld(name, value)):
        return problem
    if least is not None and value < least:
        return f"{name}={shown(value)} is too small; it must be at least {least}"
    if above is not None and value <= above:
        return f"{name}={shown(value)} must be greater than {above}"
    if most is not None and value > most:
        return f"{name}={shown(value)} is too large; it may be up to {most}"
    if metadata.get("one_of") is not None and value not in metadata["one_of"]:
        return f"{name}={shown(value)} is not known; it may be one of {list(metadata['one_of'])}"
    return None


def unheld(name: str, value: float) -> str | None:
    """What is to be said of a number that float32 would hold as 0 or infinity; None of others."""
    # One of NumPy's would take the bounds to its own dtype.
    if not value or SMALLEST_FLOAT <= abs(float(value)) <= LARGEST_FLOAT:
        return None
    return (
        f"{name}={shown(value)} cannot be held in float32; it may be 0 or of a size from "
        f"{SMALLEST_FLOAT:.2g} to {LARGEST_FLOAT:.2g}"
    )


def misfit(value: Any, annotation: Any, name: str) -> str | None:
    """What keeps ``value`` from being an ``annotation``, with its place; None where nothing does.

    Known are int, float, bool, str, None, unions, ``list``, ``tuple`` and ``dict`` of them, and
    TypedDicts, which may have more keys than they name. ``Annotated[A, B]`` must be both. Of any
    other class, ``value`` must be an instance; what is no class is not looked at.

    Args:
        value: as a field holds it, or as it comes from JSON.
        annotation: what it may be.
        name: of the place, to begin the text with; parts of it are named ``name[0]``, ``name.key``.
    """
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return None
    if origin is Annotated:
        found = (misfit(value, part, name) for part in (parts[0], *annotation.__metadata__))
        return next(filter(None, found), None)
    if is_union(annotation):
        # Where just one of several kinds has parts, what is wrong inside it says most.
        found = [misfit(value, part, name) for part in parts]
        inside = [text for text in found if text and not text.startswith(f"{name}=")]
        return None if None in found else (inside or [_must_be(name, value, annotation)])[0]
    if origin in (typing.Required, typing.NotRequired):
        return misfit(value, parts[0], name)
    if origin in (list, tuple):
        return _misfit_of_items(value, annotation, parts[0], name)
    if origin is dict or typing.is_typeddict(annotation):
        return _misfit_of_keys(value, annotation, name)
    return None if _is(value, annotation) else _must_be(name, value, annotation)


def require_kind(name: str, value: Any, annotation: Any) -> None:
    """Raises ConfigError unless ``value`` fits the annotation, as `misfit` has it."""
    problem = misfit(value, annotation, name)
    if problem is not None:
        raise ConfigError(problem)


def _misfit_of_items(value: Any, annotation: Any, item: Any, name: str) -> str | None:
    if not isinstance(value, list | tuple):
        return _must_be(name, value, annotation)
    found = (misfit(entry, item, f"{name}[{index}]") for index, entry in enumerate(value))
    return next(filter(None, found), None)


def _misfit_of_keys(value: Any, annotation: Any, name: str) -> str | None:
    if not isinstance(value, dict):
        return _must_be(name, value, dict)
    if typing.is_typeddict(annotation):
        hints, needed = _hints(annotation), annotation.__required_keys__
    else:
        hints, needed = dict.fromkeys(value, typing.get_args(annotation)[1]), frozenset()
    for key, hint in hints.items():
        said = key if str(key).isprintable() else repr(key)
        place = f"{name}.{said}" if name else str(said)
        if key in value:
            problem = misfit(value[key], hint, place)
            if problem is not None:
                return problem
        elif key in needed:
            return f"{place} is missing"
    return None


def _is(value: Any, annotation: Any) -> bool:
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is int:
        return isinstance(value, numbers.Integral)
    if annotation is bool:
        return isinstance(value, bool | np.bool)
    if annotation is float:
        return isinstance(value, numbers.Real) and _is_finite(value)
    if annotation is None:
        return value is None
    return not isinstance(annotation, type) or _is_instance(value, annotation)


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _is_instance(value: Any, annotation: type) -> bool:
    return getattr(annotation, "_is_protocol", False) or isinstance(value, annotation)


def _must_be(name: str, value: Any, annotation: Any) -> str:
    return f"{name}{'=' if name else ''}{shown(value)} must be {spell(annotation)}"


def shown(value: Any) -> str:
    """A value as an error shows it: in one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split("\n"))
    except ValueError:  # Python does not write whole numbers of thousands of digits
        return "(a number of thousands of digits)"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def whole_number(text: str) -> int | None:
    """The number that plain digits are; None for any other text, and for what nothing counts to.

    ``int`` takes digits of every script, and fails at thousands of them.
    """
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def is_union(annotation: Any) -> bool:
    """Whether an annotation is one of several, as ``int | None``."""
    return isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union


def spell(annotation: Any) -> str:
    """An annotation in words, as errors and the help say it."""
    if is_union(annotation):
        return " or ".join(map(spell, typing.get_args(annotation)))
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    names |= {types.NoneType: "none", None: "none", dict: "an object of keys and values"}
    names |= {tuple[int, ...]: "whole numbers such as 4,8,16", tuple[str, ...]: "texts"}
    names |= {tuple[float, ...]: "numbers such as .7,.3"}
    if annotation in names:
        return names[annotation]
    if typing.get_origin(annotation) in (list, tuple):
        return "a list"
    if typing.get_origin(annotation) is dict or typing.is_typeddict(annotation):
        return names[dict]
    return f"a {getattr(annotation, '__name__', annotation)}"


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True)
