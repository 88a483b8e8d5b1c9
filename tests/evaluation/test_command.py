"""What is said where a package is missing, and where the console scripts lead."""

import configparser
import dataclasses
import importlib
import sys
import types
from fnmatch import fnmatch
from pathlib import Path

import pytest
from interop.golden_models import FOLDERS

from deltaproduct_jax.errors import ConfigError, RunDirectoryError, require_at_least
from deltaproduct_jax.evaluation import command
from deltaproduct_jax.interop import fla
from experiments import evaluate

ROOT = Path(__file__).parents[2]


def test_without_the_harness_there_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    says = "evaluation needs the package lm_eval; pip install 'deltaproduct_jax[evaluation]' "
    assert command.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")
    argv = [f"--workdir={tmp_path / 'w'}", f"--model={FOLDERS / 'a_gated'}", "--tasks=piqa"]
    assert evaluate.flags.run(evaluate.command, argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")
    assert not (tmp_path / "w").exists()


def test_a_task_that_fails_by_itself_is_one_line_and_a_fault_of_ours_is_none(monkeypatch, tmp_path):
    known = {"arc_easy", "arc_challenge"}
    manager = types.SimpleNamespace(
        match_tasks=lambda names: [k for k in sorted(known) for n in names if fnmatch(k, n)]
    )
    given, asked, ways = [], [], iter([lambda: [].pop(), lambda: require_at_least("x", "y", 1)])
    for name, members in (
        ("lm_eval", {"simple_evaluate": lambda **options: given.append(options) or next(ways)()}),
        (
            "lm_eval.tasks",
            {"TaskManager": lambda include_path: asked.append(include_path) or manager},
        ),
    ):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    folder = str(FOLDERS / "a_gated")
    fields = {"num_fewshot": 3, "batch_size": 5, "limit": 7}
    for_model = {"checkpoint": "newest", "tokenizer": "bytes", "dtype": "bfloat16", "seed": 11}
    for_model |= {"max_length": 99, "add_bos": False, "mesh": "data:2"}
    options = evaluate.EvaluateConfig(
        model=folder, tasks=("arc_*",), include_path=str(tmp_path), **fields, **for_model
    )

    with pytest.raises(
        ConfigError, match=r"^tasks=arc_\*: the harness fails: IndexError: pop from empty list$"
    ):
        evaluate.evaluate(options)
    assert given[0]["tasks"] == ["arc_challenge", "arc_easy"]
    assert given[0]["model_args"] == {"path": folder} | for_model
    assert {name: given[0][name] for name in fields} == fields
    seeds = [given[0][f"{name}_seed"] for name in ("random", "numpy_random", "torch_random")]
    assert [*seeds, given[0]["fewshot_random_seed"]] == [11] * 4
    assert asked == [str(tmp_path)]

    with pytest.raises(TypeError):
        evaluate.evaluate(options)
    (tmp_path / "file").write_text("")
    for path, says in (("file", "is no folder"), ("gone", "is no folder"), ("", "is empty")):
        with pytest.raises(ConfigError, match=says):
            evaluate.evaluate(
                dataclasses.replace(options, include_path=path and str(tmp_path / path))
            )
    with pytest.raises(RunDirectoryError, match=r"^model=nowhere has no config\.json"):
        evaluate.evaluate(dataclasses.replace(options, model="nowhere"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model": ""}, "--model is missing; give a run directory"),
        ({"tasks": ()}, "--tasks is missing; give names of tasks"),
        ({"batch_size": 0}, "batch_size=0 is too small; it must be at least 1"),
        ({"max_length": 1}, "max_length=1 is too small; it must be at least 2"),
        ({"num_fewshot": -1}, "num_fewshot=-1 is too small; it must be at least 0"),
        ({"limit": 0}, "limit=0 is too small; it must be at least 1"),
        ({"seed": 2**32}, "seed=4294967296 is too large; it may be up to 4294967295"),
    ],
)
def test_settings_are_checked(fields, says):
    with pytest.raises(ConfigError, match=says):
        evaluate.EvaluateConfig(**({"model": "x", "tasks": ("piqa",)} | fields))


def test_without_safetensors_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r"pip install 'deltaproduct_jax\[interop\]' installs"):
        fla.load(FOLDERS / "a_gated")


def test_entry_points_lead_somewhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = setup["options.entry_points"]
    ((_, target),) = (line.split(" = ") for line in groups["console_scripts"].split("\n") if line)
    module, name = target.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    ((name, target),) = (line.split(" = ") for line in groups["lm_eval.models"].split("\n") if line)
    assert (name, target) == (command.NAME, command.CLASS)
