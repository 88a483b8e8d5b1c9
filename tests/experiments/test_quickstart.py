"""The README: its two commands, its examples, and what it promises of them."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import quickstart
from experiments.lib import environment

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TINY = ["--steps=4", "--train_length=4", "--hidden_size=8", "--head_dim=4", "--batch_size=4"]
TINY += ["--curriculum=", "--warmup_steps=0", "--eval_sequences=8", "--eval_batch_size=8"]
TINY += ["--eval_lengths=4,16", "--implementation=recurrent"]


def test_quickstart_trains_both_models_and_draws_them(tmp_path, capsys):
    quickstart.command([f"--workdir={tmp_path}", "--seed=3", *TINY])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("S3 trained at length 4")
    assert out[1].split("  ") == ["length", "n_h = 1", "n_h = 2"]
    assert [int(line.split()[0]) for line in out[2:4]] == [4, 16]
    figure = tmp_path / "S3_seed3.png"
    assert out[4] == f"figure: {figure}"
    assert figure.read_bytes().startswith(b"\x89PNG")
    sizes = []
    for n_h in (1, 2):
        run = tmp_path / f"S3_seed3_nh{n_h}"
        assert json.loads((run / "config.json").read_text())["model"]["num_householder"] == n_h
        sizes.append(json.loads((run / "results.json").read_text())["parameters"]["total"])
    assert sizes[0] < sizes[1]


def test_quickstart_refuses_the_flag_it_sets_itself(capsys):
    from experiments.lib import flags

    assert flags.run(quickstart.command, ["--num_householder=3"]) != 0
    error = capsys.readouterr().err
    assert "num_householder" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_examples_of_the_readme_run(example):
    exec(compile(example, "README.md", "exec"), {})


def test_commands_of_the_readme_exist():
    block = re.search(r"## Two commands.*?```sh\n(.*?)```", README, re.DOTALL).group(1)
    scripts = [line.split()[1] for line in block.splitlines()]
    assert scripts == ["experiments/quickstart.py", "tests/run.py"]
    for script in scripts:
        assert (ROOT / script).exists()
    assert "python3 tests/run.py" in (ROOT / ".ci" / "run").read_text()


def test_importing_the_package_is_quick_and_needs_no_test_packages():
    program = (
        "import time; start = time.perf_counter(); import sys, deltaproduct_jax; "
        "print(time.perf_counter() - start, sorted({'beartype', 'chex', 'hypothesis', 'pytest', "
        "'matplotlib', 'jax_triton', 'orbax'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    for _ in range(2):  # the first may find a cold disk
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        seconds, loaded = out.split(maxsplit=1)
        assert loaded.strip() == "[]"
        if float(seconds) < 10:
            return
    raise AssertionError(f"{seconds} s; 3 on a quiet machine, this one may be busy with others")


def test_set_up_names_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(environment, "VENV", tmp_path / "venv")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        environment._set_up()
    assert stopped.value.code == 1
    assert re.search(r"apt-get install python3\.\d+-venv\n$", capsys.readouterr().err)
    assert not (tmp_path / "venv").exists()

    monkeypatch.setattr(environment.sys, "version_info", (3, 10, 4, "final", 0))
    with pytest.raises(SystemExit):
        environment._set_up()
    assert "Python 3.11 or newer is needed, this is 3.10.4" in capsys.readouterr().err


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What the set-up would run; nothing is installed."""
    ran = []
    monkeypatch.setattr(environment, "VENV", tmp_path / "venv")

    def call(command, **options):
        ran.append((command, options))
        if "--target" in command:
            Path(command[command.index("--target") + 1]).mkdir(parents=True)
        return 0

    monkeypatch.setattr(environment.subprocess, "call", call)
    return ran


def test_an_extra_stands_beside_the_packages_and_is_installed_once(commands, monkeypatch):
    folder = environment.extra_folder("tpu")
    monkeypatch.setattr(environment, "_set_up", lambda: Path("python"))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    for _ in range(2):
        with pytest.raises(SystemExit):
            environment.go_on_inside("tests.run", ["tpu"])
    assert [command[2] for command, _ in commands] == ["pip", "tests.run", "tests.run"]
    assert str(ROOT / "requirements-tpu.txt") in commands[0][0]
    for _, options in commands[1:]:
        assert options["env"]["PYTHONPATH"].split(os.pathsep) == [str(folder), "elsewhere"]
    (folder / "requirements.sha256").write_text("of other requirements")
    with pytest.raises(SystemExit):
        environment.go_on_inside("tests.run", ["tpu"])
    assert [command[2] for command, _ in commands[3:]] == ["pip", "tests.run"]
    with pytest.raises(SystemExit):
        environment.go_on_inside("experiments.quickstart")
    assert commands[-1][1]["env"]["PYTHONPATH"] == "elsewhere"


@pytest.mark.parametrize("stamp", ["of other requirements", None])
def test_an_environment_that_is_a_link_is_not_cleared(stamp, commands, tmp_path, capsys):
    shared = tmp_path / "shared"
    (shared / "bin").mkdir(parents=True)
    (shared / "bin" / "python").touch()
    if stamp is not None:
        (shared / environment.STAMP).write_text(stamp)
    environment.VENV.symlink_to(shared)
    with pytest.raises(SystemExit, match="1"):
        environment.go_on_inside("tests.run")
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'venv'} is a link to {shared}, which does not hold")
    assert said.count("\n") == 1
    assert not commands


def test_an_unknown_extra_is_refused_before_anything_is_installed(commands, capsys):
    with pytest.raises(SystemExit) as stopped:
        environment.go_on_inside("tests.run", ["npu"])
    assert stopped.value.code == 1
    known = "tpu, gpu, cuda, gluon, evaluation, gcs"
    says = f"error: --extra=npu is not known; it may be one of {known}\n"
    assert capsys.readouterr().err == says
    assert not commands


def test_the_extra_installs_what_jax_asks_for():
    """The compiler that package jax names, of a version at least as new."""
    pins = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M))
    if importlib.metadata.version("jax") != pins["jax"]:
        return  # a newer JAX is being tested, which asks for another
    of_jax = " ".join(importlib.metadata.requires("jax"))
    (wanted,) = re.findall(r"libtpu==([\d.]+)\.\*", of_jax)
    (pinned,) = re.findall(r"libtpu==([\d.]+)", environment.extra_requirement("tpu"))
    assert _numbers(pinned) >= _numbers(wanted)


def _numbers(version):
    return [int(part) for part in version.split(".")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_factors_track_s3_and_one_does_not(seed, tmp_path):
    quickstart.command([f"--workdir={tmp_path}", f"--seed={seed}"])
    accuracy = {}
    for n_h in (1, 2):
        results = json.loads((tmp_path / f"S3_seed{seed}_nh{n_h}" / "results.json").read_text())
        for entry in results["test"]:
            for protocol in ("paper", "strict"):
                accuracy[n_h, entry["length"], protocol] = entry[protocol]["sequence_accuracy"]
    for protocol in ("paper", "strict"):
        assert accuracy[2, 32, protocol] >= 0.99
        assert accuracy[2, 128, protocol] >= 0.95
        assert accuracy[1, 32, protocol] < 0.05
