"""Mixers and tasks of other people's files, as the page shows them: trained, resumed, swept."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from example_plugins import EXAMPLES, TINY, flags_of, forget, written
from flax import nnx
from sweeps.helpers import ROOT, table
from tiny_run import outcome

from deltaproduct_jax import load_run
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import GatedDeltaProduct
from deltaproduct_jax.layers.registry import MIXERS, register_mixer
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.tasks.registry import TASKS, register_task
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.extending import with_defaults
from deltaproduct_jax.training.plugins import import_plugins
from experiments import state_tracking, sweep, train
from experiments.lib.sweeps.grid import claim, expand

CHOSEN = {"task": "first", "mixer": "average", "horizon": 4}


@pytest.fixture
def files(tmp_path):
    with written(tmp_path) as files:
        yield files


def test_files_from_outside_are_trained_and_the_run_goes_on(files, tmp_path, capsys):
    workdir = tmp_path / "run"
    argv = flags_of(workdir, files, **CHOSEN)
    assert train.main(argv) == 0
    assert "strict" in capsys.readouterr().out
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["plugins"] == {"plugins": files.split(",")}
    assert (saved["task"]["task"], saved["model"]["horizon"]) == ("first", 4.0)

    before = outcome(workdir)
    (workdir / "results.json").unlink()  # as if killed before the end
    forget()
    assert train.main(argv) == 0
    assert outcome(workdir) == before
    starts = json.loads((workdir / "run.json").read_text())["starts"]
    assert len(starts) == 2

    forget()
    config = RunConfig.from_dict(saved)
    assert config.to_dict() == saved
    assert type(config.model).__name__ == "AverageConfig"
    forget()
    assert load_run(workdir).config.to_dict() == saved
    forget()
    again = [f"--config={workdir}/config.json", f"--workdir={workdir}"]
    assert train.main(again) == 0  # a finished run: the same configuration is not refused
    assert train.main(flags_of(workdir, files, **CHOSEN | {"horizon": 5})) == 2
    assert "horizon (4.0 there, 5.0 here)" in capsys.readouterr().err


def fixed_of(files) -> str:
    settings = TINY | CHOSEN | {"plugins": files}
    del settings["horizon"]
    return ";".join(f"{name}={value}" for name, value in settings.items())


def test_tables_of_a_sweep_need_no_plugins(files, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sweep"
    assert len(claim(folder, "train", ["horizon=2,8"], fixed_of(files))) == 2
    for path in files.split(","):
        Path(path).unlink()
    forget()
    assert sweep.main([f"--workdir={folder}", "--launcher=none"]) == 0
    assert set(table(folder)) == {"horizon=2", "horizon=8"}
    assert sweep.main([f"--workdir={folder}"]) == 2
    assert "average.py' is no file" in capsys.readouterr().err


def test_a_sweep_knows_what_plugins_register(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = ",".join(EXAMPLES)  # by names that mean nothing elsewhere
    plain = fixed_of(here).replace(f";plugins={here}", "")
    for grid, fixed in (
        ("horizon=2,8", fixed_of(here)), (f"horizon=2,8;plugins=({here})", plain)
    ):  # fmt: skip
        runs = expand("train", [grid], fixed)
        assert [run.config["model"]["horizon"] for run in runs] == [2.0, 8.0]
        assert all(run.settings["plugins"] == files for run in runs)
        forget()
    claim(tmp_path / "sweep", "train", ["horizon=2,8"], fixed_of(here))
    forget()  # the folder's sweep goes on in another process
    assert len(claim(tmp_path / "sweep", None, [], "")) == 2
    with pytest.raises(
        ConfigError, match="'horizn' is no setting of train; did you mean 'horizon'"
    ):
        expand("train", ["horizn=2"], fixed_of(here))


@pytest.mark.slow
def test_files_from_outside_are_swept(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as its batches are small
    workdir, fixed = tmp_path / "sweep", fixed_of(files)
    argv = [f"--workdir={workdir}", "--script=train", "--grid=horizon=2,8", f"--fixed={fixed}"]
    assert sweep.main([*argv, "--workers=2"]) == 0
    rows = table(workdir)
    assert {row["horizon"]: row["state"] for row in rows.values()} == {"2.0": "done", "8.0": "done"}
    accuracies = {row["results.test.8.loss"] for row in rows.values()}
    assert len(accuracies) == 2


def test_a_mixer_from_outside_keeps_its_promises(files):
    """Steps, segments and padding, as those of the project."""
    import_plugins(files.split(","))
    config = MIXERS["average"].config(
        vocab_size=5, mixer="average", hidden_size=8, intermediate_size=8, horizon=3.0
    )
    model = SequenceModel(config, rngs=nnx.Rngs(0))
    ids = jnp.array([[1, 2, 3, 4, 0, 2]])
    run = nnx.jit(lambda model, ids, **read: model(ids, **read))
    whole, (state, outputs) = run(model, ids), (model.init_state(1), [])
    step = nnx.jit(lambda model, state, ids: model.step(state, ids))
    for t in range(6):
        out, state = step(model, state, ids[:, t])
        outputs.append(out)
    np.testing.assert_allclose(jnp.stack(outputs, 1), whole, atol=1e-5)
    packed = run(model, jnp.concatenate([ids, ids], 1), segment_ids=jnp.arange(12)[None] // 6)
    np.testing.assert_allclose(packed, jnp.concatenate([whole, whole], 1), atol=1e-5)
    padded = jnp.insert(ids, 2, 3, axis=1)
    got = run(model, padded, mask=(jnp.arange(7) != 2)[None])
    np.testing.assert_allclose(jnp.delete(got, 2, axis=1), whole, atol=1e-5)


def test_flags_of_a_plugin_are_those_of_its_mixer(files, tmp_path, capsys):
    for argv, text in (
        (["--plugins=" + files, "--mixer=average", "--horizon=0.5"], "horizon=0.5 is too small"),
        (["--plugins=" + files, "--horizon=2"], "horizon"),  # delta_product has no such field
        (["--mixer=average"], "mixer='average' is not known"),
        (["--plugins=" + files, "--mixer=average", "--num_heads=2"], "num_heads=2 does not fit"),
        ([f"--plugins={tmp_path}/none.py"], "none.py' is no file"),
        (["--plugins=no.such.module"], "'no.such.module' is no module"),
    ):
        assert state_tracking.main([f"--workdir={tmp_path}/run", *argv]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
        forget()
    assert train.main([f"--workdir={tmp_path}/run", "--task=none"]) == 2
    assert (
        "task='none' is not known; it may be one of ['formal_languages'" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        train.main(["--plugins=" + files, "--mixer=average", "--task=first", "--help"])
    shown = capsys.readouterr().out
    assert "--horizon: tokens over which the average forgets (default 8.0)" in shown
    assert "--letters: number of letters (default 4)" in shown


def test_registrations_that_cannot_be_honoured(files):
    import_plugins(files.split(","))
    import_plugins(files.split(","))  # once more is no other
    with pytest.raises(ConfigError, match="mixer='average' has fields of its own"):
        ModelConfig(mixer="average")
    average = MIXERS["average"]
    with pytest.raises(ConfigError, match="mixer='gla' is taken by"):
        register_mixer("gla", average.layer, state=average.state)
    with pytest.raises(ConfigError, match="must be a class of SequenceMixer"):
        register_mixer("linear", nnx.Linear, state=average.state)
    register_mixer("average", average.layer, state=average.state)
    with pytest.raises(ConfigError, match="keywords horizon are no fields of ModelConfig"):
        ModelConfig(mixer="average")
    with pytest.raises(ConfigError, match="task='groups' is taken by"):
        register_task("groups", TASKS["first"])
    with pytest.raises(ConfigError, match="must have a setting for task, model"):
        register_task("layer", RunConfig)
    with pytest.raises(ConfigError, match="must be a dataclass"):
        register_task("layer", GatedDeltaProduct)


# What is wrong in a file of somebody else: a piece of what the page shows, what stands there
# instead, and what is said of it.
WRONG = {
    "average.py": [
        ("def _token", "def token", "must have _token$"),
        ("def init_state", "def initial_state", "must have init_state$"),
        (", rngs: nnx.Rngs", "", "must have a keyword rngs of its constructor$"),
        ("state=AverageState,", "state=None,", "state=None of mixer 'average' must be a class$"),
        ("(ModelConfig)", "", "must have mixer, vocab_size$"),
        ('= setting(8.0, "tokens over which the average forgets", least=1)', "= 8.0", "horizon$"),
        ("    horizon: float =", "    horizons: float =", "fields horizons of the config of"),
        (
            "state=AverageState,",
            "state=AverageState, idle=3,",
            "idle=3 of mixer 'average' must be a function",
        ),
        ('("average",', '(" ",', "name of a mixer must be a text of its own, got ' '"),
    ],
    "first.py": [
        ("frozen=True", "frozen=False", "must be a frozen dataclass$"),
        ("def score", "def scores", "must have score$"),
        ("def batch", "def draw", "must have batch$"),
        ("    vocab_size =", "    size =", "must have vocab_size$"),
        ('= setting(4, "number of letters", least=2)', "= 4", "setting for letters$"),
        ('register_task("first"', "register_task(1", "name of a task must be a text of its own"),
    ],
}


@pytest.mark.parametrize(
    ("name", "piece", "instead", "said"),
    [(name, *wrong) for name, of_file in WRONG.items() for wrong in of_file],
)
def test_what_is_registered_is_looked_at_then(name, piece, instead, said, tmp_path):
    code = EXAMPLES[name]
    assert piece in code
    path = tmp_path / name
    path.write_text(code.replace(piece, instead))
    with pytest.raises(ConfigError, match=said):
        import_plugins([str(path)])


@pytest.mark.parametrize("value", ["nan", "1e400", "1e-300"])
def test_fields_of_a_plugin_are_checked_for_it(value, files, tmp_path, capsys):
    path = tmp_path / "first.py"
    letters = '    letters: int = setting(4, "number of letters", least=2)\n'
    more = letters + '    rate: float = setting(0.5, "any")\n'
    path.write_text(path.read_text().replace(letters, more))
    workdir = tmp_path / "run"
    assert train.main(flags_of(workdir, files, task="first", mixer="gla", rate=value)) == 2
    assert "rate=" in capsys.readouterr().err
    assert not workdir.exists()
    task = TASKS["first"](rate=float(value))
    with pytest.raises(ConfigError, match="rate="):
        RunConfig(task, ModelConfig(vocab_size=4), TrainConfig())


def test_an_empty_name_among_plugins_is_refused(tmp_path, capsys):
    assert train.main(flags_of(tmp_path / "run", "average.py,")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: flag --plugins=average.py,: it must be texts, without an empty entry"
    assert not (tmp_path / "run").exists()


def test_a_field_that_is_a_flag_already_is_refused(files, tmp_path, capsys):
    path = tmp_path / "first.py"
    path.write_text(path.read_text().replace("letters", "workdir"))
    assert train.main(flags_of(tmp_path / "run", files, task="first", mixer="gla")) == 2
    assert "'workdir' of section 'task' is a flag already, of every command" in (
        capsys.readouterr().err
    )


def test_a_mixer_without_a_dtype_of_its_own_takes_nothing(files):
    import_plugins(files.split(","))
    layer = MIXERS["average"].layer(4, rngs=nnx.Rngs(0))
    for shape in ((0, 3, 4), (2, 0, 4)):
        assert layer(jnp.zeros(shape))[0].shape == shape


@pytest.mark.parametrize("ends", ["sys.exit(main())", "raise SystemExit", "sys.exit('usage')"])
def test_a_script_that_ends_the_program_is_no_plugin(ends, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(f"import sys\nmain = lambda: 3\n{ends}\n")
    with pytest.raises(ConfigError, match=r"^plugins='.*script\.py' ends the program when it is"):
        import_plugins([str(path)])


def test_a_saved_run_is_read_with_care():
    saved = json.loads((ROOT / "tests" / "data" / "presets.json").read_text())
    for preset in saved.values():  # of version 0.1, before there were plug-ins
        config = RunConfig.from_dict(preset["config"])
        assert config.to_dict() == with_defaults(preset["config"], config)
    whole = {"task": {"group": "S3"}, "model": {}, "train": {}}
    for content, text in (
        ([1], "its sections must be task, model, train"),
        (whole | {"data": {}}, "its sections must be task, model, train"),
        (whole | {"model": {"width": 3}}, "'width' is no field of section 'model'"),
        (whole | {"task": {"colour": 3}}, "the fields colour of section 'task' must be those of"),
    ):
        with pytest.raises(ConfigError, match=text):
            RunConfig.from_dict(content)
