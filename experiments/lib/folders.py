"""What a folder holds, so that no command makes another thing in it or reads it for one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaproduct_jax.data.manifest import MANIFEST
from deltaproduct_jax.data.preparation import UNDER_WAY
from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.files import errors_as_one_line, read_json
from deltaproduct_jax.training.records import CHECKPOINTS, CONFIG, METRICS
from experiments.lib.legs.leg import TRAINING
from experiments.lib.sweeps.grid import LIST

RUN, SWEEP, SEARCH, TEXT = "a run", "a sweep", "a search", "prepared text"
MODEL, LEGS = "a model of flash-linear-attention", "legs of experiments.language.paper"
TRIED, CHOSEN = "tried", "chosen"  # folders of the two sweeps of a search


def _is_text(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MANIFEST, UNDER_WAY))


def _is_model(folder: Path) -> bool:
    path = folder / CONFIG
    try:
        return path.is_file() and "model_type" in read_json(path, dict[str, Any])
    except RunDirectoryError:  # it is damaged, and whoever reads it says how
        return False


def _is_run(folder: Path) -> bool:
    there = any((folder / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS))
    return there and not (_is_text(folder) or _is_model(folder))


HOLDS: dict[str, Callable[[Path], bool]] = {
    RUN: _is_run,
    SWEEP: lambda folder: (folder / LIST).exists(),
    SEARCH: lambda folder: (folder / TRIED / LIST).exists(),
    TEXT: _is_text,
    MODEL: _is_model,
    LEGS: lambda folder: any(
        any(folder.glob(pattern)) for pattern in (f"records/*/{TRAINING}", f"tokens/*/{MANIFEST}")
    ),
}


def held_by(folder: Path) -> list[str]:
    """What a folder holds, of `HOLDS`; nothing where there is none.

    Raises:
        RunDirectoryError: that cannot be told.
    """
    with errors_as_one_line(folder, "read"):
        return [what for what, holds in HOLDS.items() if holds(folder)]


def refuse_other(folder: Path, wanted: str, name: str = "workdir") -> None:
    """Raises RunDirectoryError where a folder holds something, and not what is ``wanted`` there.

    What holds both is gone on with.

    Args:
        folder: of the setting ``name``.
        wanted: what the command makes, of `HOLDS` or not.
        name: of the setting.
    """
    held = held_by(folder)
    if held and wanted not in held:
        raise RunDirectoryError(
            f"{name}={folder} holds {' and '.join(held)}; for {wanted} it may be another folder"
        )
