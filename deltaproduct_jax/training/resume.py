"""Where a run goes on: which checkpoint, and what becomes of records that lost theirs.

Nothing is deleted but what remains of a checkpoint whose removal a kill has cut short: what a run
does not go on from is renamed, and a line says so.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import orbax.checkpoint as ocp

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.files import AnyPath, in_bucket, is_there, set_aside
from deltaproduct_jax.training.checkpoints import Checkpoints, DamagedCheckpointError, steps_in
from deltaproduct_jax.training.records import CHECKPOINTS, RunRecords
from deltaproduct_jax.training.step import TrainState


def prepare(records: RunRecords, resume_from: int | None, like: TrainState) -> None:
    """Renames what the run shall not go on from, before anything else in it is touched.

    Args:
        records: of the run.
        resume_from: step of the checkpoint to go on from; 0 begins again; None is the newest.
        like: a state of the run's model.

    Raises:
        RunDirectoryError: there is no such checkpoint, it is damaged, or a link leads nowhere.
    """
    directory = records.checkpoints
    if not in_bucket(directory) and directory.is_symlink() and not directory.exists():
        raise RunDirectoryError(  # a disk that is not there now, and no run that has none
            f"{directory} is a link to {os.readlink(directory)}, which cannot be reached; bring "
            "that back, or remove the link"
        )
    rows, _ = records.saved_rows(), records.starts()  # before anything is renamed, they are whole
    steps = steps_in(directory)
    if resume_from == 0:
        _begin_again(records, "resume_from is 0")
    elif resume_from is not None:
        _go_on_from(records, resume_from, steps, like)
    elif not (in_bucket(directory) or directory.is_dir()):  # a bucket has no empty folders
        if rows or is_there(directory):
            what = "no directory" if is_there(directory) else "missing"
            _begin_again(records, f"{CHECKPOINTS} is {what}")
    elif not steps and records.saves_due(rows) > 1:
        # A save is begun only after the one before it has reached the disk.
        _begin_again(records, f"{CHECKPOINTS} holds none")
    if not in_bucket(directory):
        _end_removals(directory)


def _end_removals(directory: AnyPath) -> None:
    """Removes emptied folders of steps before the newest checkpoint; no other may be a run's."""
    newest, last = max(steps_in(directory), default=0), ocp.path.atomicity.COMMIT_SUCCESS_FILE
    before = (path for path in directory.glob("[0-9]*") if path.name.isdecimal())
    for folder in [path for path in before if int(path.name) < newest]:
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {last}:
            with contextlib.suppress(OSError):  # one that stays does no harm
                (folder / last).unlink(missing_ok=True)
                folder.rmdir()


def _begin_again(records: RunRecords, reason: str) -> None:
    kept = ", ".join(path.name for path in records.begin_again())
    beside = f"; what was there is kept as {kept}" if kept else ""
    _say(f"{records.directory}: {reason}, so the run begins again{beside}")


def _go_on_from(records: RunRecords, step: int, steps: list[int], like: TrainState) -> None:
    directory = records.checkpoints
    if step not in steps:
        known = "".join(f"{known}, " for known in steps) + ("or 0" if steps else "0")
        raise RunDirectoryError(
            f"resume_from={step} is no checkpoint in {directory}; it may be {known}, which begins "
            "the run again beside the old records"
        )
    with Checkpoints(directory, read_only=True) as checkpoints:
        with remedy(checkpoints, like):
            checkpoints.restore(step, like)
        whole = checkpoints.whole(like, up_to=step)
    for other in steps:
        if other not in whole:
            kept = set_aside(directory / str(other))
            _say(f"{directory}: checkpoint {other} is kept as {kept.name}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def remedy(checkpoints: Checkpoints, like: TrainState) -> Iterator[None]:
    """Adds to the error about a damaged checkpoint which other one the run can go on from."""
    try:
        yield
    except DamagedCheckpointError as error:
        whole = [step for step in checkpoints.whole(like) if step != error.step]
        says = "no other one is whole: --resume_from=0 begins the run again beside the old records"
        if whole:
            step = max(whole)
            says = f"checkpoint {step} is whole: --resume_from={step} goes on from it"
        raise RunDirectoryError(f"{error}; {says}") from error


def newest_state(checkpoints: Checkpoints, like: TrainState) -> TrainState:
    """The state of the newest checkpoint, or ``like`` without any.

    Raises:
        RunDirectoryError: it is damaged; the text names one that is whole, and the flag for it.
    """
    with remedy(checkpoints, like):
        checkpoints.best()  # if it cannot be told, better known now than at the end
        newest = checkpoints.newest()
        return like if newest is None else checkpoints.restore(newest, like)


def best_state(checkpoints: Checkpoints, like: TrainState) -> tuple[int, TrainState]:
    """Step and state of the best checkpoint; RunDirectoryError as for the newest."""
    with remedy(checkpoints, like):
        best = checkpoints.best()
        if best is None:
            raise RunDirectoryError(
                f"{checkpoints.directory} has no checkpoint whose evaluation gave a finite number"
            )
        return best, checkpoints.restore(best, like)
