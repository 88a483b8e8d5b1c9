"""The numbers in which runs may differ and still be trained together, declared in one place.

All else of a configuration is built into the compiled program: shapes, lengths, steps, the mixer,
and AdamW's two decays, whose distance from 1 a traced float32 would not hold.
"""

import json
from collections.abc import Mapping
from typing import Any

from deltaproduct_jax.training.optimizer import Numbers

# By section of a configuration. What no program sees: the keys and the parameters that a run starts
# from follow from the first three, and when it ends is decided outside.
FREE: dict[str, tuple[str, ...]] = {
    "train": (*Numbers._fields, "seed", "stop_accuracy"),
    "model": ("beta_bias", "initial_gate", "initializer_range"),
}
# Of these, what tells where parameters start and not which there are: none at all is the same.
STARTS = ("initial_gate",)


def program_of(config: Mapping[str, Mapping[str, Any]]) -> str:
    """The same text for all runs that can be trained together, and for no others.

    Args:
        config: sections of a configuration as config.json has them.
    """
    return json.dumps({name: _fixed(name, values) for name, values in config.items()})


def _fixed(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    # A number that is there or not is another program, but for those in which a run starts.
    free = FREE.get(section, ())
    return {
        name: "a number" if name in free and value is not None else value
        for name, value in sorted(values.items())
        if name not in free or name not in STARTS
    }
