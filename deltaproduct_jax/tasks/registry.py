"""The tasks that a run may have by name, those of the project and those that others register."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from deltaproduct_jax.errors import ConfigError, refuse_taken, require_name, require_one_of
from deltaproduct_jax.settings import check_fields, require_settings, setting
from deltaproduct_jax.tasks.task import Task

TASKS: dict[str, type] = {}
NAME = "task"  # field of a task that was chosen by its name


def register_task(name: str, task: type) -> None:
    """Makes ``--task=name`` a choice of ``experiments.train``.

    Args:
        name: what the flag says.
        task: a frozen dataclass that is a ``Task``, each field a ``setting``; they become flags.

    Raises:
        ConfigError: the name is no text or taken by another class, or ``task`` is not as said.
    """
    require_name("task", name)
    require_settings(f"the task of name {name!r}", task, _needed(task))
    if NAME in task.__dataclass_fields__:
        raise ConfigError(f"task {name!r} must have no field that is called {NAME!r}")
    refuse_taken("task", name, task, TASKS.get(name))
    TASKS[name] = task


def _needed(task: type) -> list[str]:
    """What a ``Task`` has; one that is read from a stream has no batches, nor scores of them."""
    members = [*Task.__annotations__, *(name for name in vars(Task) if name[0] != "_")]
    drawn = ("batch", "score") if hasattr(task, "stream") else ()
    return [name for name in members if name not in drawn]


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

    def check(self):
        check_fields(self)  # before checks of its own, which take the kinds of values for granted
        getattr(task, "__post_init__", lambda self: None)(self)

    own = {"__post_init__": check}
    named = dataclasses.make_dataclass(
        task.__name__, [field], bases=(task,), frozen=True, namespace=own
    )
    named.__module__ = task.__module__  # from Python 3.12 on it is this one's before
    return named


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
