"""Our models, and flash-linear-attention's, under lm-evaluation-harness: the paper's tasks.

    python -m experiments.evaluate --model=runs/text --preset=paper --workdir=evals/text

evaluates a run directory, or a folder of flash-linear-attention, and writes ``results.json`` with
everything that the harness reports. Tasks are the harness's, by name; ``--include_path`` adds those
of a folder. Its own command line, with all of its flags, is ``deltaproduct-lm-eval``.

Source: https://arxiv.org/abs/2502.10297, its ten language tasks: without examples in the prompt,
    64 rows at a time, bfloat16, seed 42.
Expect: a table with a row for every task and metric, with its standard error.
Takes: hours on an H100 for the paper's tasks, which the harness fetches from Hugging Face's hub.
"""

import dataclasses
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from deltaproduct_jax.errors import ConfigError, require_package
from deltaproduct_jax.evaluation.command import NAME, register
from deltaproduct_jax.evaluation.models import is_folder_of_fla
from deltaproduct_jax.evaluation.tasks import PAPER
from deltaproduct_jax.files import any_path, given_by, user_path, write_file
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.records import RESULTS
from experiments.lib import flags
from experiments.lib.folders import refuse_other

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER}


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated on what; raises ConfigError where the fields make no sense."""

    model: str = setting("", "run directory, or folder of flash-linear-attention")
    checkpoint: str = setting("best", "of a run directory: best, newest, or a step")
    tokenizer: str | None = setting(
        None, "bytes, mistral, a tokenizer.json or a SentencePiece model; none: the directory's own"
    )
    tasks: tuple[str, ...] = setting((), "the harness's names of tasks")
    include_path: str | None = setting(None, "folder with more tasks, in the harness's format")
    num_fewshot: int | None = setting(
        None, "examples in each prompt; none: as the task says", least=0
    )
    limit: int | None = setting(None, "documents of a task at most; none: all", least=1)
    batch_size: int = setting(16, "rows at a time", least=1)
    dtype: str | None = setting(None, "dtype of the computation; none: the model's own")
    max_length: int = setting(
        2048, "tokens of a prompt and what follows; longer ones are cut left", least=2
    )
    add_bos: bool = setting(True, "BOS, the token that begins a document, stands before every text")
    seed: int = setting(
        0,
        "of examples drawn for prompts, of resampling, and of drawn tokens",
        least=0,
        most=2**32 - 1,  # the harness sets the seed that all of NumPy has in common
    )
    mesh: str = setting("data:1", "devices: data and fsdp cut batches, tensor cuts heads")

    def __post_init__(self):
        check_fields(self)
        if not self.model:
            raise ConfigError("--model is missing; give a run directory or a folder")
        if not self.tasks:
            raise ConfigError("--tasks is missing; give names of tasks, or --preset=paper")

    def model_args(self) -> dict[str, Any]:
        """Keywords of the harness's class."""
        names = ("checkpoint", "tokenizer", "dtype", "max_length", "add_bos", "mesh", "seed")
        return {"path": self.model} | {name: getattr(self, name) for name in names}


def command(argv: Sequence[str]) -> None:
    """Evaluates, writes results.json, prints the harness's table."""
    parsed = flags.parse(argv, {"evaluate": EvaluateConfig}, PRESETS)
    options = EvaluateConfig(**parsed.sections["evaluate"])
    refuse_other(parsed.workdir, "an evaluation")
    register()
    results = evaluate(options)
    utils = require_package("lm_eval.utils", "evaluation", "evaluation")
    # Among them are functions of the tasks, which the harness writes by their names.
    text = json.dumps(results, indent=2, default=utils.handle_non_serializable)
    write_file(parsed.workdir / RESULTS, text.encode() + b"\n")
    print(utils.make_table(results))


def evaluate(options: EvaluateConfig) -> Mapping[str, Any]:
    """What the harness reports, without the samples.

    Raises:
        ConfigError: a task is not known, or fails by itself: its data are not there, or not as it
            says.
        RunDirectoryError: the model's directory holds none.
    """
    model = any_path(options.model, "model")
    with given_by("model", model):  # which the harness calls path
        is_folder_of_fla(model)
    harness = require_package("lm_eval", "evaluation", "evaluation")
    given = options.include_path
    folder = None if given is None else user_path(given, "include_path")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"include_path={given!r} is no folder; it may be one of tasks")
    manager = require_package("lm_eval.tasks", "evaluation", "evaluation").TaskManager(
        include_path=None if folder is None else str(folder)
    )
    unknown = [name for name in options.tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(f"tasks={','.join(unknown)}: the harness knows no such task")
    try:
        return harness.simple_evaluate(
            model=NAME,
            model_args=options.model_args(),
            tasks=manager.match_tasks(list(options.tasks)),  # as patterns name them
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            limit=options.limit,
            task_manager=manager,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
            log_samples=False,
        )
    except Exception as error:
        if is_ours(error):
            raise
        why = traceback.format_exception_only(error)[-1]
        raise ConfigError(f"tasks={','.join(options.tasks)}: the harness fails: {why}") from error


def is_ours(error: Exception) -> bool:
    """Whether an error comes from this package's code, not from a task's or the harness's own."""
    frames = traceback.walk_tb(error.__traceback__)
    modules = {frame.f_globals.get("__name__", "") for frame, _ in frames}
    return any(name.partition(".")[0] == "deltaproduct_jax" for name in modules)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
