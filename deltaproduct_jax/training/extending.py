"""How two configurations differ, and whether a run of the one may go on as the other."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.training.config import RunConfig, TrainConfig, plain

ABSENT = object()
STEPS = "train.steps"


def with_defaults(saved: Any, config: RunConfig) -> Any:
    """A configuration as it was saved; a field that its version did not have has its default."""
    if not isinstance(saved, Mapping):
        return saved
    filled = dict(saved)
    for section in dataclasses.fields(config):
        if isinstance(saved.get(section.name), Mapping):
            fields = dataclasses.fields(getattr(config, section.name))
            defaults = {
                f.name: f.default
                for f in fields
                # What is recorded if it is set is left out by records of this version as well.
                if f.default is not dataclasses.MISSING and not f.metadata.get("recorded_if_set")
            }
            filled[section.name] = plain(defaults) | dict(saved[section.name])
    return filled


def differences(saved: Any, config: Any) -> dict[str, tuple[Any, Any]]:
    """Differing fields by "section.name": what each configuration has there, or `ABSENT`."""
    have, want = _flat(saved), _flat(config)
    pairs = {name: (have.get(name, ABSENT), want.get(name, ABSENT)) for name in want | have}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(config: Any) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {"config": config}
    return {
        f"{section}.{name}": value
        for section, values in config.items()
        for name, value in (values if isinstance(values, Mapping) else {"": values}).items()
    }


def is_extension(saved: Any, config: RunConfig) -> bool:
    """Whether only ``steps`` differs, is larger, and changes nothing in the steps made before.

    Raises:
        RunDirectoryError: it is larger, and would change them.
    """
    differing = differences(saved, config.to_dict())
    if set(differing) != {STEPS}:
        return False
    before, now = differing[STEPS]
    if type(before) is not int or before > now:
        return False
    name = spread_over_steps(config.train)
    if name is not None:
        raise RunDirectoryError(
            f"steps={now} cannot extend the {before} steps of this run: {name} is spread over all "
            f"steps, so that those made would have been others; give steps={before}, or another "
            "workdir"
        )
    return True


def spread_over_steps(train: TrainConfig) -> str | None:
    """The setting by which an early step depends on how many there will be, None without one."""
    if train.schedule != "constant" and train.end_learning_rate != train.learning_rate:
        return f"schedule={train.schedule}"
    grows = "grow_from" if train.grow_from is not None else "curriculum" if train.curriculum else ""
    return grows if grows and train.curriculum_fraction else None
