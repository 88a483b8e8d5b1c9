"""Checkpoints of flash-linear-attention to ours and back, from and to folders and run directories.

    python -m experiments.convert --source=runs/text --workdir=models/text

writes the best checkpoint of a run as a folder that flash-linear-attention loads, with a model
card. ``--source`` may also be such a folder: it is written anew in today's format, that of the
paper's fork included. With ``--to=run`` it becomes a run directory that training goes on from:

    python -m experiments.convert --source=models/text --to=run --like=runs/text \\
        --workdir=runs/more
    python -m experiments.language_modeling --config=runs/more/config.json --workdir=runs/more

Source: https://github.com/fla-org/flash-linear-attention, its models' config.json and tensors.
Expect: one line that says what was written and the most memory that it took: that of the model,
    its largest tensor and about 300 MiB for Python and JAX; tensors are the same bit by bit.
Takes: seconds for models of some megabytes; reading and writing the file for large ones.
"""

import dataclasses
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.evaluation.models import (
    IDS,
    checkpoint_of,
    ids_of_folder,
    ids_of_run,
    is_folder_of_fla,
    load_folder,
)
from deltaproduct_jax.files import AnyPath, any_path, given_by, whole_or_absent, write_file
from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import SequenceModel, count_parameters
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.strict_json import to_json
from deltaproduct_jax.training.checkpoints import Checkpoints
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.optimizer import make_optimizer
from deltaproduct_jax.training.records import CHECKPOINTS, CONFIG
from deltaproduct_jax.training.runs import load_run, read_config
from deltaproduct_jax.training.step import init_state, split_model
from experiments.lib import flags
from experiments.lib.folders import MODEL, RUN, refuse_other
from experiments.lib.model_facts import facts_of_run

PRESETS: dict[str, dict[str, Any]] = {"default": {}}
TARGETS = ("fla", "run")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What is read and what is written; raises ConfigError where the fields make no sense."""

    source: str = setting("", "run directory, or folder of flash-linear-attention")
    to: str = setting(
        "fla", "fla: a folder of flash-linear-attention; run: a run directory", one_of=TARGETS
    )
    checkpoint: str = setting("best", "of a run directory: best, newest, or a step")
    like: str | None = setting(
        None, "run directory whose task and training a new run takes; for to=run"
    )
    param_dtype: str | None = setting(
        None, "dtype to convert a folder's parameters to; none: as they are there"
    )
    bos_token_id: int | None = setting(
        None, "for config.json: id of the token that begins a document; if not given, the source's"
    )
    eos_token_id: int | None = setting(
        None, "the same of the token that ends one; of a run's text it is the one that begins one"
    )
    pad_token_id: int | None = setting(None, "the same of padding")

    def __post_init__(self):
        check_fields(self)
        if not self.source:
            raise ConfigError("--source is missing; give a run directory or a folder")
        if (self.to == "run") != (self.like is not None):
            raise ConfigError(
                f"to={self.to} and like={self.like} do not fit; like is for to=run, which needs it"
            )


def command(argv: Sequence[str]) -> None:
    """Reads, writes, and says so."""
    parsed = flags.parse(argv, {"convert": ConvertConfig}, PRESETS)
    options = ConvertConfig(**parsed.sections["convert"])
    refuse_other(parsed.workdir, MODEL if options.to == "fla" else RUN)
    source = any_path(options.source, "source")
    with given_by("source", source):
        model, facts, ids = _read(source, options)
    if options.to == "fla":
        given = {name: x for name, x in parsed.sections["convert"].items() if name in IDS}
        fla.save(model, parsed.workdir, facts=facts, **ids | given)
    else:
        _write_run(model, any_path(options.like, "like"), parsed.workdir)
    parameters = count_parameters(model)["total"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{source} -> {parsed.workdir}: {parameters:,} parameters, {peak:,.0f} MiB of memory")


def _read(
    source: AnyPath, options: ConvertConfig
) -> tuple[SequenceModel, dict[str, Any], dict[str, Any]]:
    """The model of either kind of directory, what is known of it, and ids of special tokens."""
    if is_folder_of_fla(source):
        model = load_folder(source, options.checkpoint, options.param_dtype)
        return model, {}, ids_of_folder(source)
    if options.param_dtype is not None:
        raise ConfigError(f"param_dtype={options.param_dtype} is for folders; {source} is a run")
    run = load_run(source, checkpoint_of(options.checkpoint))
    return run.model, facts_of_run(source, run.config, run.step), ids_of_run(run.config.task)


def _write_run(model: SequenceModel, like: AnyPath, workdir: Path) -> None:
    """A run that has made no step yet, with this model in its first checkpoint."""
    with given_by("like", like):
        other = read_config(like)
    config = RunConfig(other.task, model.config, other.train, other.plugins)
    if workdir.exists() and any(workdir.iterdir()):
        raise RunDirectoryError(f"{workdir} is not empty; give another workdir")
    _, params = split_model(model)
    with whole_or_absent(lambda: [workdir / CHECKPOINTS]):
        with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
            checkpoints.save(init_state(params, make_optimizer(config.train)), 0, None)
        # Last: without it the directory is no run, and none begins in it.
        write_file(workdir / CONFIG, to_json(config.to_dict()))


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
