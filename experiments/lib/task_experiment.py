"""What the experiments that train on a task share: flags, configuration, the command, its table."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import any_path, is_there
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel import processes
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.loop import train
from deltaproduct_jax.training.plugins import PluginConfig
from deltaproduct_jax.training.records import RESULTS
from experiments.lib import flags
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.folders import RUN, refuse_other

Row = Mapping[str, Any]  # column of a table -> text, whole number or accuracy
NOT_FLAGS = ("vocab_size",)  # of the model: the task's
# What presets do not vary, so that no other default of the model's changes their results. Fields
# that are none stay so, as in the records of older runs: a mixer's registration says what they are.
MODEL: dict[str, Any] = {
    "mixer": "delta_product",
    "num_layers": 1,
    "hidden_ratio": 4.0,
    "norm_eps": 1e-6,
    "tie_embeddings": False,
    "initializer": "paper",
    "initializer_range": 0.02,
    "dtype": "float32",
    "param_dtype": "float32",
    "remat": "none",
}


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """How this start of a run differs from others of the same run; no part of its configuration."""

    resume_from: int | None = setting(
        None,
        "step of the checkpoint to go on from, once: later and damaged ones are renamed; 0 begins "
        "the run again beside its old records; none: the newest",
        least=0,
    )
    bucket: str | None = setting(
        None,
        "where checkpoints are saved and records copied, for processes that share no disk: "
        "gs://BUCKET/FOLDER, or a folder that all see; none: the workdir, which all then share",
    )

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class TaskExperiment:
    """An experiment that trains one model on one task.

    Attributes:
        name: of its module in ``experiments``.
        task: dataclass of the task, whose fields become flags, or one with a ``variant``.
        presets: values of fields by preset.
        rows: (entry of results.json's "test") -> rows of the table that is printed.
        figure: name of the picture in the run directory, without an ending; None if there is none.
        draw: (run, results, path of the picture, its look) draws it.
        default_workdir: where to run if no flag says so; None where one must.
    """

    name: str
    task: type
    presets: flags.Presets
    rows: Callable[[Mapping[str, Any]], list[Row]]
    figure: str | None = None
    draw: Callable[[RunConfig, Mapping[str, Any], Path, Look], Any] | None = None
    default_workdir: str | None = None

    @property
    def sections(self) -> flags.Sections:
        """Sections of config.json, whose dataclasses' fields are the flags."""
        own = {"task": self.task, "model": ModelConfig}
        return own | {"train": TrainConfig, "plugins": PluginConfig}

    def configure(self, sections: Mapping[str, Mapping[str, Any]]) -> RunConfig:
        """The run that flags describe."""
        task, model = self._task(sections["task"]), sections["model"]
        return RunConfig(
            task=task,
            model=ModelConfig.variant(model)(vocab_size=task.vocab_size, **model),
            train=TrainConfig(**sections["train"]),
            plugins=PluginConfig(**sections["plugins"]),
        )

    def _task(self, given: Mapping[str, Any]) -> Any:
        kind = self.task.variant(given) if hasattr(self.task, "variant") else self.task
        return kind(**given)

    def command(self, argv: Sequence[str]) -> None:
        """Trains as the flags say, prints a table and draws the figure."""
        sections = {**self.sections, "start": StartConfig, "devices": DeviceConfig}
        sections |= {} if self.figure is None else SECTION
        parsed = flags.parse(
            argv,
            sections,
            self.presets,
            exclude=NOT_FLAGS,
            default_workdir=self.default_workdir,
            writes=False,  # to a run that is finished
        )
        devices = DeviceConfig(**parsed.sections["devices"])
        processes.keep_programs(devices)
        processes.join(devices)
        config, workdir = self.configure(parsed.sections), parsed.workdir
        self._check_vocabulary(parsed.saved)
        start = StartConfig(**parsed.sections["start"])
        look = parsed.sections.get("figures", {})
        Look(**look)  # an error now, not after the run
        home = workdir if start.bucket is None else any_path(start.bucket, "bucket")
        for place, name in {home: "bucket", workdir: "workdir"}.items():
            if isinstance(place, Path):  # a bucket is the run's that names it
                refuse_other(place, RUN, name)
        was_finished = is_there(home / RESULTS)
        argv = [f"experiments.{self.name}", *argv]
        results = train(
            config,
            workdir,
            argv,
            resume_from=start.resume_from,
            devices=devices,
            bucket=start.bucket,
        )
        if not processes.is_first():
            return
        try:
            self._show(config, results, workdir, look)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if not was_finished:
                raise
            raise RunDirectoryError(
                f"{workdir / RESULTS} does not hold the scores of {self.name}: {error!r}"
            ) from error

    def _check_vocabulary(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises ConfigError if the file of --config has a vocabulary that is not its task's."""
        size = saved.get("model", {}).get("vocab_size")
        if size is not None and "task" in saved:
            wanted = self._task(saved["task"]).vocab_size
            if size != wanted:
                raise ConfigError(f"--config: vocab_size={size} must be the task's, {wanted}")

    def _show(
        self,
        config: RunConfig,
        results: Mapping[str, Any],
        workdir: Path,
        given: Mapping[str, Any],
    ) -> None:
        """Prints the table, and draws the figure if a flag is of it or it is older than results."""
        print(self.table(results))
        if self.figure is None:
            return
        path, look, made = workdir / self.figure, Look(**given), (workdir / RESULTS).stat().st_mtime
        drawn = [file.stat().st_mtime for file in look.files(path) if file.exists()]
        if given or not drawn or min(drawn) < made:
            self.draw(config, results, path, look)

    def table(self, results: Mapping[str, Any]) -> str:
        """Scores of the best checkpoint on the test split."""
        rows = [row for entry in results["test"] for row in self.rows(entry)]
        first = f"best checkpoint: step {results['best_step']} of {results['steps']}; test split:"
        return "\n".join([first, *table_lines(rows)])

    def main(self, argv: Sequence[str]) -> int:
        """Exit code of the command; ``argv`` without the program's name."""
        return flags.run(self.command, argv, goes_on=True)


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The columns' names and the rows, right-aligned; accuracies have four decimals."""
    cells = [
        [f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()]
        for row in rows
    ]
    columns = zip(rows[0], *cells, strict=True)
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in ([*rows[0]], *cells)
    ]
