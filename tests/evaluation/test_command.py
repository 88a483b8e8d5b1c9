"""What is said where a package is missing, and where the console scripts lead."""

import configparser
import importlib
import sys
from pathlib import Path

import pytest
from interop.golden_models import FOLDERS

from deltaproduct_jax.errors import ConfigError
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
