"""How much memory a compiled program takes, as its compiler says."""

from typing import Any


def memory_of(compiled: Any) -> dict[str, int | None]:
    """Bytes on one device by the compiler's own account.

    Args:
      compiled: what ``jax.jit(f).lower(...).compile()`` gives.

    Returns:
      "temp_bytes", "argument_bytes", "output_bytes", "alias_bytes" (of outputs that share the
      memory of a donated argument, and are counted with both) and "generated_code_bytes"; each None
      where the compiler says nothing.
    """
    memory = compiled.memory_analysis()
    kinds = ("temp", "argument", "output", "alias", "generated_code")
    return {
        f"{kind}_bytes": None if memory is None else getattr(memory, f"{kind}_size_in_bytes")
        for kind in kinds
    }
