"""What a run is: how it is trained, what it learns, which model, all frozen and self-checking."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.errors import ConfigError, require_ascending
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.settings import (
    LARGEST_COUNT,
    check_fields,
    recorded,
    require_kind,
    seed_setting,
    setting,
)
from deltaproduct_jax.tasks.registry import class_of_task
from deltaproduct_jax.tasks.task import MAX_BATCH_INDEX, Task
from deltaproduct_jax.training.loss import LossSettings
from deltaproduct_jax.training.plugins import PluginConfig, import_plugins
from deltaproduct_jax.training.text import TextTask

SCHEDULES = ("cosine", "constant", "wsd")
OPTIMIZERS = ("adamw", "muon")
DECAYED = ("all", "matrices")
GROWTHS = ("linear", "geometric")
SEED_PURPOSES = ("init", "data")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained and watched; raises ConfigError where the fields make no sense."""

    steps: int = setting(500, "updates of the parameters", least=1, most=MAX_BATCH_INDEX)
    batch_size: int = setting(64, "sequences per update", least=1)
    accumulation_steps: int = setting(
        1, "parts of a batch whose gradients are added in turn", least=1
    )
    optimizer: str = setting(
        "adamw",
        "adamw; or muon, for the matrices between hidden channels, and AdamW for the rest",
        recorded_if_set=True,
        one_of=OPTIMIZERS,
    )
    learning_rate: float = setting(1e-3, "peak learning rate", above=0)
    schedule: str = setting(
        "cosine",
        "learning rate after the warm-up: cosine; constant; or wsd (warm-up, stable, decay): "
        "constant, then linear",
        one_of=SCHEDULES,
    )
    warmup_steps: int = setting(0, "steps over which the learning rate rises from 0", least=0)
    end_learning_rate: float = setting(0.0, "learning rate that cosine and wsd fall to", least=0)
    decay_fraction: float = setting(
        0.2,
        "part of the steps, at their end, in which wsd falls",
        recorded_if_set=True,
        above=0,
        most=1,
    )
    weight_decay: float = setting(0.01, "decay of the parameters, times the learning rate", least=0)
    decayed: str = setting(
        "all",
        "parameters that decay: all, as in the paper; or matrices, which spares norms, biases and "
        "convolutions",
        recorded_if_set=True,
        one_of=DECAYED,
    )
    muon_momentum: float = setting(0.95, "decay of Muon's moment", recorded_if_set=True)
    adam_b1: float = setting(0.9, "decay of AdamW's first moment")
    adam_b2: float = setting(0.999, "decay of AdamW's second moment")
    adam_eps: float = setting(1e-8, "epsilon of AdamW", above=0)
    clip_norm: float | None = setting(
        None, "largest global norm of the gradient; none: no limit", above=0
    )
    loss_chunk_size: int | None = setting(
        None,
        "tokens of a batch whose logits exist at once; none: all",
        recorded_if_set=True,
        least=1,
    )
    z_loss: float = setting(
        0.0,
        "weight of the squared logarithm of the softmax's denominator in what is minimised",
        recorded_if_set=True,
        least=0,
    )
    max_skipped_steps: int = setting(
        10,
        "steps skipped in a row, as their loss or gradient is not finite, that end the run",
        most=LARGEST_COUNT,
        least=1,
    )
    spike_deviations: float | None = setting(
        None,
        "skip a step whose loss or gradient norm is so many standard deviations above the mean of "
        "the last 100; none: however high",
        above=0,
    )
    curriculum: tuple[int, ...] = setting(
        (), "lengths trained one after another before the full one", least=1
    )
    curriculum_fraction: float = setting(
        0.5, "part of the steps that the curriculum's lengths share evenly, or that growth takes"
    )
    grow_from: int | None = setting(
        None,
        "tokens whose answers count at first, of sequences of the full length; one more at a time "
        "until all do; none: all from the start",
        least=1,
    )
    growth: str = setting(
        "linear",
        "what takes equally long while grow_from grows: linear, every token more; geometric, every "
        "doubling",
        one_of=GROWTHS,
    )
    seed: int = seed_setting("the seed that every other seed is derived from")
    log_every: int = setting(10, "steps between records", least=1)
    eval_every: int = setting(100, "steps between evaluations on the validation split", least=1)
    checkpoint_every: int = setting(100, "steps between checkpoints", least=1)
    eval_sequences: int = setting(512, "sequences per evaluation, at each length", least=1)
    eval_batch_size: int = setting(128, "sequences evaluated at a time", least=1)
    select_length: int | None = setting(
        None, "length whose evaluation selects the best checkpoint; none: the longest", least=1
    )
    stop_accuracy: float | None = setting(
        None,
        "stop once the validation sequence accuracy reaches this; none: never",
        above=0,
        most=1,
    )

    @classmethod
    def without_use(cls, values: Mapping[str, Any]) -> list[str]:
        """Fields of a preset that mean nothing beside these values."""
        schedule = values.get("schedule", cls.schedule)
        idle = ["end_learning_rate"] if schedule == "constant" else []
        idle += [] if schedule == "wsd" else ["decay_fraction"]
        return idle + ([] if values.get("optimizer") == "muon" else ["muon_momentum"])

    def __post_init__(self):
        check_fields(self)
        for name in ("adam_b1", "adam_b2", "muon_momentum", "curriculum_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be in [0, 1)")
        if self.grow_from is not None and self.curriculum:
            raise ConfigError(
                f"grow_from={self.grow_from} and curriculum={self.curriculum} exclude each other"
            )
        if self.growth != "linear" and self.grow_from is None:
            raise ConfigError(
                f"growth={self.growth!r} means nothing without grow_from; set that too"
            )
        self._check_steps()
        _require_divisible(self, "batch_size", "accumulation_steps")
        _require_divisible(self, "eval_sequences", "eval_batch_size")

    def _check_decay(self) -> None:
        for name, used in (("decay_fraction", "schedule=wsd"), ("muon_momentum", "optimizer=muon")):
            field, value = used.split("=")
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and getattr(self, field) != value:
                raise ConfigError(
                    f"{name}={getattr(self, name)} needs {used}, got {field}={getattr(self, field)}"
                )
        if self.decay_steps + self.warmup_steps > self.steps and self.schedule == "wsd":
            raise ConfigError(
                f"decay_fraction={self.decay_fraction} of steps={self.steps} and "
                f"warmup_steps={self.warmup_steps} must not overlap"
            )

    @property
    def decay_steps(self) -> int:
        """Steps at the end in which ``wsd`` falls."""
        return max(1, round(self.steps * self.decay_fraction))

    @property
    def loss_settings(self) -> LossSettings:
        """What is minimised, and how it is computed."""
        return LossSettings(self.loss_chunk_size, self.z_loss)

    def _check_steps(self) -> None:
        if self.warmup_steps > self.steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} must not exceed steps={self.steps}"
            )
        if self.schedule == "constant" and self.end_learning_rate:
            raise ConfigError(
                f"end_learning_rate={self.end_learning_rate} needs schedule=cosine or wsd; "
                "a constant schedule ends where it began"
            )
        self._check_decay()
        if self.end_learning_rate > self.learning_rate:
            raise ConfigError(
                f"end_learning_rate={self.end_learning_rate} must not exceed "
                f"learning_rate={self.learning_rate}"
            )


def _require_divisible(config: TrainConfig, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ConfigError(
            f"{whole}={getattr(config, whole)} must be a multiple of {part}={getattr(config, part)}"
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run; the model reads and writes the task's vocabulary.

    That of a text is looked at where the text is read: a run is also loaded where there is none.
    """

    task: Task | TextTask
    model: ModelConfig
    train: TrainConfig
    plugins: PluginConfig = dataclasses.field(default_factory=PluginConfig)

    def __post_init__(self):
        check_fields(self)
        check_fields(self.task)  # a plug-in's, which may not do so itself
        require_kind("test_lengths", self.task.test_lengths, tuple[int, ...])
        require_ascending("test_lengths", tuple(self.task.test_lengths))
        if self.is_streamed:
            self._check_streamed()
        elif self.model.vocab_size != self.task.vocab_size:
            raise ConfigError(
                f"vocab_size={self.model.vocab_size} must be the task's, {self.task.vocab_size}"
            )
        if self.train.curriculum and max(self.train.curriculum) > self.task.train_length:
            raise ConfigError(
                f"curriculum={self.train.curriculum} must not exceed "
                f"train_length={self.task.train_length}"
            )
        for length in self.train.curriculum:
            self.task.check_length("curriculum", length)
        self._check_growth()
        self.task.check_length("select_length", self.select_length)

    @property
    def is_streamed(self) -> bool:
        """Whether batches are read from a stream that has a state, and not drawn from a key."""
        return hasattr(self.task, "stream")

    def _check_streamed(self) -> None:
        for name in ("curriculum", "stop_accuracy"):
            value = getattr(self.train, name)
            if value:
                raise ConfigError(
                    f"{name}={value} needs a task whose batches are drawn from a key; "
                    f"{type(self.task).__name__} is read from a stream"
                )

    @property
    def select_length(self) -> int:
        """Length whose evaluation selects the best checkpoint."""
        if self.train.select_length is not None:
            return self.train.select_length
        return self.task.test_lengths[-1]

    def evaluated_by(self, length: int) -> str:
        """The setting that an evaluation of this length comes from."""
        return "eval_lengths" if length in self.task.test_lengths else "select_length"

    def length_at(self, step: int) -> int:
        """Length trained at ``step`` (from 1): a function of the step alone, so resume is easy."""
        curriculum = self.train.curriculum
        if curriculum:
            share = self.train.steps * self.train.curriculum_fraction / len(curriculum)
            stage = int((step - 1) // share) if share else len(curriculum)
            if stage < len(curriculum):
                return curriculum[stage]
        return self.task.train_length

    def counted_at(self, step: int | jax.Array) -> int | jax.Array:
        """Tokens of a sequence whose answers count at ``step`` (from 1), which may be traced."""
        first, last = self.train.grow_from, self.task.train_length
        if first is None:
            return self.length_at(step)
        steps = int(self.train.steps * self.train.curriculum_fraction)
        if self.train.growth == "geometric":
            shares = np.log(np.arange(first + 1, last + 1) / first) / np.log((last + 1) / first)
            begins = np.ceil(steps * shares - 1e-6).astype(np.int32) + 1  # of every further token
            if isinstance(step, int):
                return first + int(np.sum(step >= begins))
            return first + jnp.sum(step >= begins, dtype=jnp.int32)
        wait = steps // (last - first + 1)
        counted = first + (step - 1) // max(wait, 1)
        return min(counted, last) if isinstance(counted, int) else jnp.minimum(counted, last)

    def _check_growth(self) -> None:
        first = self.train.grow_from
        if first is None:
            return
        if first > self.task.train_length:
            raise ConfigError(
                f"grow_from={first} must not exceed train_length={self.task.train_length}"
            )
        if not self.task.answers_every_token:
            raise ConfigError(
                f"grow_from={first} needs a task that has an answer at every token; "
                f"{type(self.task).__name__} has not, as it is set"
            )

    def is_logged(self, step: int) -> bool:
        """Whether ``step`` has a record: every log_every, at evaluations, checkpoints, the end."""
        return (
            step % self.train.log_every == 0
            or self.is_evaluated(step)
            or step % self.train.checkpoint_every == 0
        )

    def is_evaluated(self, step: int) -> bool:
        """Whether the validation split is evaluated after ``step``."""
        return step % self.train.eval_every == 0 or step == self.train.steps

    def seeds(self) -> dict[str, int]:
        """One seed a purpose, by name: changing what one is used for leaves the others alone."""
        return {purpose: seed_for(self.train.seed, purpose) for purpose in SEED_PURPOSES}

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as JSON knows it: sections of plain values.

        The section of plug-ins is there if the run has any.
        """
        return {
            section.name: plain(recorded(getattr(self, section.name)))
            for section in dataclasses.fields(self)
            if section.name != "plugins" or self.plugins.plugins
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "RunConfig":
        """The run that :meth:`to_dict` described, in this version or an older one.

        Its plug-ins are imported first. A field that the older version did not have yet takes its
        default.

        Raises:
            ConfigError: a section or field is not known, or has a value that it may not have.
            TypeError: a value is of another type.
        """
        cls.check_sections(saved)
        plugins = _made(PluginConfig, "plugins", saved.get("plugins", {}))
        import_plugins(plugins.plugins)
        return cls(
            _made(class_of_task(saved["task"]), "task", saved["task"]),
            _made(ModelConfig.variant(saved["model"]), "model", saved["model"]),
            _made(TrainConfig, "train", saved["train"]),
            plugins,
        )

    @classmethod
    def check_sections(cls, saved: Any) -> None:
        """Raises ConfigError, naming what is unknown, unless the sections are those of a run."""
        optional = {"plugins"}
        names = {field.name for field in dataclasses.fields(cls)}
        sections = saved if isinstance(saved, Mapping) else {}
        for name in sections:
            if name not in names:
                raise ConfigError(f"section {name!r} is not known; {_SECTIONS}")
        if not names - optional <= set(sections) or not all(
            isinstance(section, Mapping) for section in sections.values()
        ):
            raise ConfigError(_SECTIONS)


_SECTIONS = "its sections must be task, model, train and, if any, plugins"


def _made(kind: type, section: str, values: Mapping[str, Any]) -> Any:
    """A dataclass of values as JSON has them."""
    known = {field.name for field in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{name!r} is no field of section {section!r}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def seed_for(seed: int, purpose: str) -> int:
    """The seed of one purpose, of a run's seed."""
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def plain(value: Any) -> Any:
    """The value as it comes back from JSON: lists for tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value
