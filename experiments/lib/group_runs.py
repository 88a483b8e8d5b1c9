"""Runs of state tracking, read back by those who look at what was trained."""

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.evaluation.models import checkpoint_of
from deltaproduct_jax.files import AnyPath, given_by
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.training.runs import Run, load_run


def load_group_run(flag: str, run: AnyPath, checkpoint: str = "best") -> Run:
    """A checkpoint of a state-tracking run, its mixer a plug-in's or not.

    Args:
        flag: which names the run.
        run: its directory.
        checkpoint: best, newest, or a step.

    Raises:
        ConfigError: the run is of another task, or has no such checkpoint.
        RunDirectoryError: it is no run, or cannot be read.
    """
    with given_by(flag, run):
        found = load_run(run, checkpoint_of(checkpoint))
    if not isinstance(found.config.task, GroupTask):
        task = type(found.config.task).__name__
        raise ConfigError(f"{flag}={run} is of the task {task}; it must be of state tracking")
    return found


def run_name(run: AnyPath) -> str:
    """A run's folder, or that of the sweep which it is one of."""
    return run.parent.parent.name if run.parent.name == "runs" and "=" in run.name else run.name


def require_answers(name: str, task: GroupTask) -> None:
    """Raises ConfigError, naming the model, unless its task has an answer after every token."""
    if not task.answers_every_token:
        raise ConfigError(f"{name} answers late (repeat_elements, merge_elements); both must be 1")
