"""The script between both worlds: a run, a folder, and a run again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.golden_models import FOLDERS, as_fork, drawn, parameters, tensors, write
from interop.golden_models import config as golden_config
from safetensors.numpy import load_file

from deltaproduct_jax import load_run
from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.strict_json import to_json
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.training.checkpoints import Checkpoints
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.optimizer import make_optimizer
from deltaproduct_jax.training.step import init_state, split_model
from deltaproduct_jax.training.text import TextTask
from experiments import convert, state_tracking

COMMIT = "0123abc"
ROW = {"step": 5, "loss": 1.25, "accuracy": 0.5, "tokens": 1920, "tokens_per_second": 1.0}
ROW |= {"time": 1.0, "valid_token_accuracy": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    task = GroupTask(group="Z3", train_length=6, eval_lengths=(6,))
    return made(tmp_path_factory.mktemp("run"), task)


def made(folder, task):
    """A run as it stands after five steps, without a step having been made."""
    model = ModelConfig(vocab_size=task.vocab_size, hidden_size=8, num_heads=2, head_dim=4)
    train = TrainConfig(steps=8, batch_size=64, log_every=1, eval_sequences=64, eval_batch_size=64)
    config = RunConfig(task, model, train)
    _, params = split_model(drawn(model))
    state = init_state(params, make_optimizer(train))._replace(step=jnp.int32(5))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state, 5, (0.5,))
    (folder / "config.json").write_bytes(to_json(config.to_dict()))
    (folder / "run.json").write_bytes(to_json({"starts": [{"commit": COMMIT, "argv": ["a", "b"]}]}))
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    return folder


def converted(source, workdir, *more):
    assert (
        convert.flags.run(convert.command, [f"--source={source}", f"--workdir={workdir}", *more])
        == 0
    )
    return workdir


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The run's best checkpoint."""
    return converted(run, tmp_path_factory.mktemp("converted") / "f")


def test_a_run_becomes_a_folder_with_its_card(folder):
    card = (folder / "README.md").read_text()
    said = {"task": "GroupTask", "steps": 5, "tokens": "1,920", "loss": 1.25, "commit": COMMIT}
    for what, value in said.items():
        assert f"| {what} | {value} |" in card


def test_a_folder_becomes_a_run_that_is_the_same_model(run, folder, tmp_path, capsys):
    new = converted(folder, tmp_path / "new", "--to=run", f"--like={run}")
    assert capsys.readouterr().out.startswith(f"{folder} -> {new}: 12,892 parameters, ")
    before, after = load_run(run), load_run(new, "newest")
    jax.tree.map(np.testing.assert_array_equal, parameters(before.model), parameters(after.model))
    assert (before.config.task, before.config.train) == (after.config.task, after.config.train)
    assert after.step == 0


@pytest.mark.slow
def test_training_goes_on_from_a_folder(run, folder, tmp_path):
    new = converted(folder, tmp_path / "new", "--to=run", f"--like={run}")
    assert state_tracking.main([f"--config={new / 'config.json'}", f"--workdir={new}"]) == 0
    starts = json.loads((new / "run.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [0]
    rows = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    # Parameters of order one, as these are, are far from where a run of its own begins.
    assert rows[0]["step"] == 1
    assert rows[0]["param_norm"] > 20


def test_the_fork_is_written_in_todays_format(tmp_path):
    fork = write(tmp_path / "fork", *as_fork("b_ungated"))
    today = converted(fork, tmp_path / "today", "--eos_token_id=3", "--bos_token_id=none")
    written = load_file(today / "model.safetensors")
    assert written.keys() == tensors("b_ungated").keys()
    assert ids_in(today) == (None, 3, None)


def ids_in(folder):
    saved = json.loads((folder / "config.json").read_text())
    return saved["bos_token_id"], saved["eos_token_id"], saved["pad_token_id"]


def test_special_tokens_are_those_of_the_source(folder, tmp_path):
    """Of a run's text, of a run without any, and of a folder, which may name several ends."""
    text = made(tmp_path / "run", TextTask())
    assert ids_in(converted(text, tmp_path / "text")) == (256, 256, None)
    assert ids_in(folder) == (None, None, None)
    for number, (said, ids) in enumerate(
        (
            ({"bos_token_id": 4, "eos_token_id": [5, 6], "pad_token_id": 0}, (4, [5, 6], 0)),
            ({"eos_token_id": None}, (1, None, None)),
        )
    ):
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        bare = {name: x for name, x in golden_config("a_gated").items() if name not in names}
        theirs = write(tmp_path / f"theirs{number}", bare | said, tensors("a_gated"))
        assert ids_in(converted(theirs, tmp_path / f"ours{number}")) == ids
        given = converted(theirs, tmp_path / f"given{number}", "--eos_token_id=7")
        assert ids_in(given) == (ids[0], 7, ids[2])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--source is missing"),
        (["--source=RUN", "--to=run"], "to=run and like=None do not fit"),
        (["--source=RUN", "--to=torch"], "to='torch' is not known"),
        (["--source=RUN", "--param_dtype=bfloat16"], "param_dtype=bfloat16 is for folders"),
        ([f"--source={FOLDERS / 'a_gated'}", "--checkpoint=4"], "checkpoint=4 is for runs"),
        (["--source=RUN/nowhere"], "nowhere has no config.json; it may be a run directory"),
        (
            [f"--source={FOLDERS / 'a_gated'}", "--to=run", "--like=RUN"],
            "vocab_size=97 must be the task's",
        ),
    ],
)
def test_what_cannot_be_converted_is_one_line(arguments, says, run, tmp_path, capsys):
    arguments = [argument.replace("RUN", str(run)) for argument in arguments]
    code = convert.flags.run(convert.command, [f"--workdir={tmp_path / 'w'}", *arguments])
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "w").exists()


def test_nothing_is_written_into_a_directory_in_use(run, folder, capsys):
    argv = [f"--source={folder}", "--to=run", f"--like={run}", f"--workdir={run}"]
    assert convert.flags.run(convert.command, argv) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["fla", "run"])
def test_a_command_that_was_interrupted_begins_anew(to, run, folder, tmp_path, monkeypatch):
    """Right before the file by which a folder is a model, or a run."""
    write = convert.write_file

    def interrupted(path, data):
        if path.name == "config.json":
            raise KeyboardInterrupt
        write(path, data)

    argv = ["--to=run", f"--like={run}"] if to == "run" else []
    argv += [f"--source={folder}", f"--workdir={tmp_path / 'w'}"]
    with monkeypatch.context() as patch:
        for module in (convert, fla.saving):
            patch.setattr(module, "write_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert.command(argv)
    assert not [path for path in (tmp_path / "w").rglob("*") if path.is_file()]
    convert.command(argv)
    assert (tmp_path / "w" / "config.json").exists()
