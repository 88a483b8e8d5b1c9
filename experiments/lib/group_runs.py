"""Runs of state tracking, read back by those who look at what was trained."""

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import AnyPath, given_by
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.training.runs import Run, load_run


def load_group_run(flag: str, run: AnyPath) -> Run:
    """The best checkpoint of a state-tracking run, its mixer a plug-in's or not.

    Raises:
        ConfigError: the run, which ``flag`` names, is of another task.
        RunDirectoryError: it is no run, or cannot be read.
    """
    with given_by(flag, run):
        found = load_run(run)
    if not isinstance(found.config.task, GroupTask):
        task = type(found.config.task).__name__
        raise ConfigError(f"{flag}={run} is of the task {task}; it must be of state tracking")
    return found
