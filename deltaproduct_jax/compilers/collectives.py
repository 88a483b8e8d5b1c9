"""What the devices of a compiled program send each other."""

import re

from deltaproduct_jax.compilers.hlo_traffic import array_bytes

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_SENT = re.compile(
    rf" = (?P<shapes>\S.*?) (?P<kind>{'|'.join((*COLLECTIVES, 'send', 'recv'))})(?:-start)?\("
)


def collectives(text: str) -> list[tuple[str, int]]:
    """Kind and bytes of every array that a compiled program sends, sorted.

    Args:
      text: what ``compiled.as_text()`` of JAX gives. Loops are not unrolled: what stands in one
        counts once.
    """
    found = []
    for match in _SENT.finditer(text):
        sizes = array_bytes(match["shapes"])
        # The compiler joins sums; a permute started ahead names its operand, result and handles.
        found += [
            (match["kind"], size) for size in (sizes if "reduce" in match["kind"] else [max(sizes)])
        ]
    return sorted(found)
