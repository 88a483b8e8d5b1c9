"""What users hold: public names, version, types, extras, and runs read back in a notebook."""

import asyncio
import configparser
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx
from packaging.requirements import Requirement
from tiny_run import leaves_equal, snapshot

import deltaproduct_jax
from deltaproduct_jax import layers, load_run
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.tasks.registry import TASKS, class_of_task
from deltaproduct_jax.training.config import RunConfig

ROOT = Path(__file__).parents[1]
RUN = ROOT / "tests" / "data" / "run_v01" / "killed"  # with checkpoints 4, evaluated, and 6


@pytest.fixture(scope="module")
def setup():
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def requirements(text):
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_public_names():
    assert deltaproduct_jax.__all__ == sorted(deltaproduct_jax.__all__)
    shown = re.findall(r"^:\w+:`(\w+)`", deltaproduct_jax.__doc__, re.MULTILINE)
    assert sorted([*shown, "__version__"]) == deltaproduct_jax.__all__
    for name in shown:
        assert getattr(deltaproduct_jax, name).__doc__, name
    public = {name for name, x in vars(layers).items() if getattr(x, "__doc__", "") and callable(x)}
    assert set(layers.__all__) == public


def test_the_version_has_one_home(setup):
    assert setup["metadata"]["version"] == "attr: deltaproduct_jax.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", deltaproduct_jax.__version__)


def test_types_are_shipped(setup):
    shipped = setup["options.package_data"]["deltaproduct_jax"].split()
    assert "py.typed" in shipped
    assert (Path(deltaproduct_jax.__file__).parent / "py.typed").exists()


def test_the_extra_test_has_every_other_but_those_of_devices(setup):
    extras = setup["options.extras_require"]
    tested = {str(each) for each in requirements(extras["test"])}
    for name in extras:
        if name not in ("gpu", "tpu"):
            missing = {str(each) for each in requirements(extras[name])} - tested
            assert not missing, f"{name} needs {missing}, which the extra test has not"


def test_the_readme_lists_every_extra(setup):
    listed = re.findall(
        r"^pip install '\.\[(\w+)\]'", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(setup["options.extras_require"])


def test_what_tests_need_is_pinned_within_its_range(setup):
    versions = {}
    for extra in ("", "-evaluation", "-gcs"):
        pinned = requirements((ROOT / f"requirements{extra}.txt").read_text())
        versions |= {each.name: str(each.specifier).removeprefix("==") for each in pinned}
    wanted = setup["options"]["install_requires"], setup["options.extras_require"]["test"]
    for each in (need for text in wanted for need in requirements(text)):
        assert each.specifier.contains(versions[each.name]), each


def test_nothing_heavy_is_imported_before_load_run_is_called_and_no_warning_shown():
    script = f"""
import sys, warnings
warnings.simplefilter("error")
from deltaproduct_jax import load_run
heavy = ("orbax", "tensorstore", "tensorboardX", "matplotlib", "deltaproduct_jax.training")
assert not [name for name in sys.modules if name.startswith(heavy)]
print(load_run({str(RUN)!r}).step)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("4\n", "")


def test_checkpoints_by_name_and_step():
    before = snapshot(RUN)
    best, newest = load_run(RUN), load_run(str(RUN), checkpoint="newest")
    assert (best.step, newest.step) == (4, 6)
    assert isinstance(best.config.task, GroupTask)
    assert best.config.train.steps == 12
    assert isinstance(best.model, SequenceModel)
    assert best.model.config == best.config.model
    parameters = [nnx.state(run.model) for run in (best, newest, load_run(RUN, 4))]
    assert leaves_equal(parameters[0], parameters[2])
    assert not leaves_equal(parameters[0], parameters[1])
    assert snapshot(RUN) == before


def test_a_directory_below_the_home(monkeypatch):
    monkeypatch.setenv("HOME", str(RUN.parent))
    assert load_run(f"~/{RUN.name}").step == 4
    with pytest.raises(ConfigError, match="NUL"):
        load_run("runs/\0")


def test_a_notebook_has_an_event_loop_already():
    async def cell():
        return load_run(RUN).step

    assert asyncio.run(cell()) == 4


def copy_of_the_run(folder, *steps):
    shutil.copytree(RUN, folder, ignore=shutil.ignore_patterns("checkpoints"))
    for step in steps:
        shutil.copytree(RUN / "checkpoints" / str(step), folder / "checkpoints" / str(step))
    return folder


def test_a_checkpoint_that_is_not_there_names_those_that_are():
    with pytest.raises(ConfigError) as error:
        load_run(RUN, 5)
    assert str(error.value) == (
        f"checkpoint=5 is not in {RUN}; it may be 'best', 'newest', or a step among 4, 6"
    )
    with pytest.raises(ConfigError, match=r"checkpoint=4\.0 is not in"):
        load_run(RUN, 4.0)
    with pytest.raises(ConfigError, match="checkpoint='last' is not in"):
        load_run(RUN, "last")
    for place in (3, None, b"runs/s3", ["runs/s3"]):
        with pytest.raises(ConfigError, match="is not known; it may be a directory, or gs://"):
            load_run(place)


def test_folders_that_hold_no_run_or_no_checkpoint_yet(tmp_path):
    def refuse(folder, says, checkpoint="best"):
        with pytest.raises(RunDirectoryError) as error:
            load_run(folder, checkpoint)
        assert says in str(error.value)
        assert "\n" not in str(error.value)

    refuse(
        tmp_path / "absent",
        f"directory={tmp_path}/absent is no run directory: it has no config.json",
    )
    refuse(RUN / "checkpoints", "is no run directory")
    early = copy_of_the_run(tmp_path / "early")
    refuse(early, "early has no checkpoints yet")
    (early / "checkpoints" / "4.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    refuse(early, "early has no checkpoint yet that was written to its end")
    refuse(early, "early has no checkpoint yet that was written to its end", 4)
    unevaluated = copy_of_the_run(tmp_path / "unevaluated", 6)
    refuse(unevaluated, "no checkpoint that was evaluated yet")
    assert load_run(unevaluated, "newest").step == 6
    shutil.rmtree(unevaluated / "checkpoints" / "6" / "default")
    refuse(unevaluated, "is damaged: it has no default", 6)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not valid JSON"),
        ("[]", "[] must be an object of keys and values"),
        ('{"task": {}, "model": 3, "train": {}}', "model=3 must be an object of keys and values"),
        ('{"task": {"group": "S3"}, "train": {}}', "sections must be task, model, train"),
        ('{"task": {"groups": "S3"}, "model": {}, "train": {}}', "the fields groups of section"),
        ('{"task": {"group": "S3"}, "model": {"width": 1}, "train": {}}', "'width' is no field"),
        ('{"task": {"group": "S3"}, "model": {}, "train": {"steps": "x"}}', "describes no run"),
        ('{"task": {"group": "S3"}, "model": {}, "train": {"steps": 0}}', "steps=0 is too small"),
        (
            '{"task": {"group": "S3"}, "model": {}, "train": {}, "x": {}}',
            "section 'x' is not known",
        ),
    ],
)
def test_configurations_that_describe_no_run(tmp_path, content, says):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunDirectoryError) as error:
        load_run(tmp_path)
    assert says in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_comes_back_from_its_record():
    config = load_run(RUN).config
    saved = config.to_dict()
    assert RunConfig.from_dict(saved) == config
    del saved["train"]["grow_from"]  # as if an older version had not had it
    assert RunConfig.from_dict(saved) == config


@pytest.mark.parametrize("task", TASKS.values())
def test_a_task_is_known_by_its_fields(task):
    names = [field.name for field in dataclasses.fields(task)]
    assert class_of_task(dict.fromkeys(names)) is task
