"""What the baselines' ops accept; the texts of their errors.

Dimension letters: B batch, T tokens, H heads, K key width, V value width.
"""

from collections.abc import Mapping
from typing import Any

import jax

from deltaproduct_jax.ops import checks

# Arrays that need not be there; of a step the state must.
OPTIONAL = ("negative", "e", "gamma", "initial_state", "segment_ids", "mask")
IMPLEMENTATIONS: tuple[str, ...] = ("recurrent", "chunked")


def check_options(implementation: Any, chunk_size: Any, T: Any) -> dict[str, Any]:
    """Both, checked; ValueError unless they go together, and with the length of the sequence."""
    if implementation != "recurrent" and not isinstance(T, int):
        raise ValueError(
            f"implementation={implementation!r} cannot run T={T}, a symbolic length; "
            "'recurrent' can, and B may be symbolic everywhere"
        )
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    chunk_size = checks.check_chunk_size(chunk_size, implementation)
    return {"implementation": implementation, "chunk_size": chunk_size}


def check_arrays(arrays: Mapping[str, tuple[jax.Array | None, str]], one_token: bool) -> None:
    """Compares arrays with their layouts, where the first with a dimension fixes its size.

    The first also fixes what dtypes of floating point the others may have: its own, or the
    accumulator's; a state has the latter.

    Args:
        arrays: name -> (array, or None for some of `OPTIONAL`; layout such as ``"B T H K"``).
        one_token: the layouts stand without their axis T.

    Raises:
        ValueError: naming the argument, what it got and what it may be.
    """
    sizes: dict[str, int] = {}
    given = {
        name: (checks.as_array(name, array), layout)
        for name, (array, layout) in arrays.items()
        if array is not None or name not in OPTIONAL
    }
    checks.check_dtypes({name: array for name, (array, _) in given.items()})
    for name, (array, layout) in given.items():
        letters = tuple(d for d in layout.split() if not (one_token and d == "T"))
        checks.check_shape(name, array.shape, letters, sizes)


def fields_of(name: str, state: Any, kind: type) -> dict[str, jax.Array]:
    """Arrays of a state by ``name.field``; ValueError unless it is of the class ``kind``."""
    if not isinstance(state, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, got {type(state).__name__}")
    return {f"{name}.{field}": array for field, array in state._asdict().items()}
