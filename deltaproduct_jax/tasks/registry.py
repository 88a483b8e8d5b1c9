"""The tasks that a run may have by name, those of the project and those that others register."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from deltaproduct_jax.errors import ConfigError, refuse_taken, require_one_of
from deltaproduct_jax.settings import setting

TASKS: dict[str, type] = {}
NAME = "task"  # field of a task that was chosen by its name


def register_task(name: str, task: type) -> None:
    """Makes ``--task=name`` a choice of ``experiments.train``.

    Args:
        name: what the flag says.
        task: a frozen dataclass that is a ``Task``, each field a ``setting``; they become flags.

    Raises:
        ConfigError: the name is taken by another class, or ``task`` is no such dataclass.
    """
    if not (isinstance(task, type) and dataclasses.is_dataclass(task)):
        raise ConfigError(f"task={task!r} of name {name!r} must be a dataclass")
    fields = dataclasses.fields(task)
    if any(field.name == NAME or "help" not in field.metadata for field in fields):
        raise ConfigError(
            f"task {name!r} must have a setting for every field, and none that is called {NAME!r}"
        )
    refuse_taken("task", name, task, TASKS.get(name))
    TASKS[name] = task


@dataclasses.dataclass(frozen=True)
class NamedTask:
    """The choice of a task; the run's task is a :meth:`variant`, which adds the task's fields."""

    task: str = setting("groups", "name of a registered task, a plug-in's included")

    @classmethod
    def variant(cls, values: Mapping[str, Any]) -> type:
        """The task named among these values, with its name as one more field."""
        name = values.get(NAME, cls.task)
        require_one_of(NAME, name, TASKS)
        return _named(name, TASKS[name])

    @classmethod
    def variants(cls) -> list[type]:
        """All that :meth:`variant` may return."""
        return [_named(name, task) for name, task in TASKS.items()]


@functools.cache
def _named(name: str, task: type) -> type:
    field = (NAME, str, setting(name, "name of a registered task, a plug-in's included"))
    return dataclasses.make_dataclass(task.__name__, [field], bases=(task,), frozen=True)


def class_of_task(values: Mapping[str, Any]) -> type:
    """The dataclass of a task that was saved as these values: by its name, or else its fields.

    Raises:
        ConfigError: no task of that name, or with those fields, is registered.
    """
    if NAME in values:
        return NamedTask.variant(values)
    fields = {task: {field.name for field in dataclasses.fields(task)} for task in TASKS.values()}
    fitting = [task for task in fields if values.keys() <= fields[task]]
    if not fitting:
        raise ConfigError(
            f"the fields {', '.join(values)} of section 'task' must be those of a registered task, "
            f"one of {', '.join(TASKS)}"
        )
    return min(fitting, key=lambda task: len(fields[task]))
