"""The largest batch that fits, of few compiled programs and a line through what they take."""

from collections.abc import Callable, Mapping
from typing import Any

MOST_COMPILES = 3


def memory_of_step(found: Mapping[str, Any]) -> int | None:
    """Bytes of a device that a step takes at least; None where the compiler did not say.

    Arguments, temporaries, outputs that do not share the arguments' memory, and code.
    """
    if "needed_bytes" in found:
        return found["needed_bytes"]
    names = ("argument_bytes", "temp_bytes", "output_bytes", "generated_code_bytes")
    numbers = [found.get(name) for name in names]
    if None in numbers:
        return None
    return sum(numbers) - (found["alias_bytes"] or 0)


def fits(found: Mapping[str, Any], limit: int) -> bool | None:
    """Whether a step fits; None where the compiler did not say how much it takes."""
    memory = memory_of_step(found)
    return None if memory is None else "needed_bytes" not in found and memory <= limit


def largest_rows(
    compile_rows: Callable[[int], Mapping[str, Any]], first: int, limit: int
) -> tuple[dict[int, Mapping[str, Any]], int | None]:
    """Looks for the most sequences of a device at once that fit.

    Args:
        compile_rows: compiles the step with so many.
        first: with which it begins.
        limit: bytes of a device.

    Returns:
        What was compiled, by sequences, `MOST_COMPILES` at most; and what the line through the last
        two says, None where there is none.
    """
    found = {first: compile_rows(first)}
    while len(found) < MOST_COMPILES:
        guess = _interpolated(found, limit)
        if guess in found:  # the line may err by one
            guess += 1 if fits(found[guess], limit) else -1
        if guess is None or guess < 1 or guess in found:
            break
        found[guess] = compile_rows(guess)
    return found, _interpolated(found, limit)


def _interpolated(found: Mapping[int, Mapping[str, Any]], limit: int) -> int | None:
    """Sequences of a device that just fit, 0 where none does; None where nothing is known."""
    known = {rows: memory_of_step(entry) for rows, entry in found.items()}
    points = sorted((rows, memory) for rows, memory in known.items() if memory is not None)
    if not points:
        return None
    state = min(_state_bytes(entry) for entry in found.values())
    # Through the state alone, with no sequence, where there is one point.
    (low, least), (high, most) = ([(0, state), *points] if len(points) == 1 else points)[-2:]
    if most <= least:
        return None
    return max(0, int(low + (limit - least) * (high - low) / (most - least)))


def _state_bytes(entry: Mapping[str, Any]) -> int:
    return entry["parameters_bytes"] + entry["moments_bytes"]
