"""What the baselines' ops accept; the texts of their errors.

Dimension letters: B batch, T tokens, H heads, K key width, V value width.
"""

from collections.abc import Mapping
from typing import Any

import jax

from deltaproduct_jax.ops import checks

IMPLEMENTATIONS: tuple[str, ...] = ("recurrent", "chunked")


def check_options(implementation: Any, chunk_size: Any, T: Any) -> None:
    """ValueError unless both are known and go together, and with the length of the sequence."""
    if implementation != "recurrent" and not isinstance(T, int):
        raise ValueError(
            f"implementation={implementation!r} cannot run T={T}, a symbolic length; "
            "'recurrent' can, and B may be symbolic everywhere"
        )
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_chunk_size(chunk_size, implementation)


def check_shapes(arrays: Mapping[str, tuple[jax.Array | None, str]], one_token: bool) -> None:
    """Compares arrays with their layouts; the first with a dimension fixes its size.

    Args:
        arrays: name -> (array or None, layout such as ``"B T H K"``).
        one_token: the layouts stand without their axis T.

    Raises:
        ValueError: naming the argument, what it got and what it may be.
    """
    sizes: dict[str, int] = {}
    for name, (array, layout) in arrays.items():
        if array is None:
            continue
        letters = [d for d in layout.split() if not (one_token and d == "T")]
        known = ", ".join(f"{d}={sizes[d]}" for d in letters if d in sizes)
        fits = len(array.shape) == len(letters) and all(
            sizes.setdefault(d, size) == size for d, size in zip(letters, array.shape, strict=True)
        )
        if not fits:
            wanted = f"[{', '.join(letters)}]" + (f" with {known}" if known else "")
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(array.shape)}")
