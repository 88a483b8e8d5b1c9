"""JSON as files of this project hold it: what a schema says, without what readers take amiss."""

import json
import math
from typing import Any, NoReturn

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.settings import misfit

# Nothing of ours is nested deeper, and recursion over what is read must end.
DEEPEST = 32


def decode(data: bytes, schema: Any, where: str) -> Any:
    """JSON that fits a schema, as `read_json`; the error begins with ``where`` it was found."""
    try:
        value = json.loads(
            data, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_each_once
        )
    except RecursionError as error:
        raise RunDirectoryError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise RunDirectoryError(f"{where} is not valid JSON: {error}") from error
    if data.count(b"[") + data.count(b"{") > DEEPEST and _is_deeper(value, DEEPEST):
        raise RunDirectoryError(f"{where} is nested too deeply; {DEEPEST} levels are the most")
    if b"\\ud" in data.lower() and not _is_text(value):
        raise RunDirectoryError(f"{where} has a character that is half of one (\\ud800 to \\udfff)")
    problem = misfit(value, schema, "")
    if problem is not None:
        raise RunDirectoryError(f"{where}: {problem}")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError where a key is there twice, of which the reader would take one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} is there more than once")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is larger than any float")
    return number


def _is_deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        inside = (v.values() if isinstance(v, dict) else v for v in layer)
        layer = [v for entries in inside for v in entries if isinstance(v, dict | list)]
        if not layer:
            return False
    return True


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def to_json(value: Any) -> bytes:
    """JSON as files hold it, NumPy's numbers too; ValueError where a number is not finite."""
    plain = json.dumps(value, indent=2, allow_nan=False, default=lambda number: number.item())
    return plain.encode() + b"\n"
