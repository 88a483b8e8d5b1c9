"""No command makes another thing where one is, or reads one thing for another."""

import json

import pytest
from helpers import refusal

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from experiments import figures
from experiments.lib import folders

# The files by which each is known, as the commands that make it write them.
FILES = {
    folders.RUN: {"config.json": {"task": {}, "model": {}, "train": {}}, "checkpoints/4/x": 0},
    folders.SWEEP: {"runs.json": {"script": "train", "runs": []}, "runs/seed=0/log.txt": 0},
    folders.SEARCH: {"tried/runs.json": {"script": "train", "runs": []}, "search.json": {}},
    folders.TEXT: {"config.json": {"data": {}}, "manifest.json": {"format": 1}},
    folders.MODEL: {"config.json": {"model_type": "delta_net"}, "model.safetensors": 0},
    folders.LEGS: {"records/tiny_seed0/training.json": {}, "tokens/code/manifest.json": {}},
}
MAKERS = {
    ("state_tracking", "--group=S3"): folders.RUN,
    ("sweep", "--script=train", "--grid=seed=0:2"): folders.SWEEP,
    ("sweep", "--launcher=none"): folders.SWEEP,
    ("search", "--launcher=none"): folders.SEARCH,
    ("prepare_text", "--sources=FILE"): folders.TEXT,
    ("convert", "--source=RUN"): folders.MODEL,
    ("convert", "--source=RUN", "--to=run", "--like=RUN"): folders.RUN,
    ("language.legs", "--legs=tiny:0"): folders.LEGS,
    ("language.paper", "--leg=tiny"): folders.LEGS,
    ("evaluate", "--model=RUN", "--tasks=x"): None,  # which write results.json
    ("theory", "--constructions=plane_Z5"): None,
}


def made(folder, what):
    for name, content in FILES[what].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def listing(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("command", MAKERS)
@pytest.mark.parametrize("what", FILES)
def test_another_thing_is_not_made_where_one_is(command, what, tmp_path):
    script, *more = command
    wanted = MAKERS[command]
    folder = made(tmp_path / "here", what)
    (tmp_path / "file").write_text("text")
    more = [m.replace("FILE", str(tmp_path / "file")).replace("RUN", str(folder)) for m in more]
    before = listing(folder)
    if wanted == what:
        folders.refuse_other(folder, wanted)
        return
    says = refusal(script, [f"--workdir={folder}", *more], RunDirectoryError)
    assert says.startswith(f"workdir={folder} holds {what}; for ")
    assert wanted is None or says.endswith(f"for {wanted} it may be another folder")
    assert listing(folder) == before


def test_what_older_versions_mixed_is_gone_on_with(tmp_path):
    made(tmp_path, folders.SWEEP)
    assert folders.held_by(made(tmp_path, folders.SEARCH)) == [folders.SWEEP, folders.SEARCH]
    folders.refuse_other(tmp_path, folders.SEARCH)
    with pytest.raises(RunDirectoryError, match="holds a sweep and a search; for a run it"):
        folders.refuse_other(tmp_path, folders.RUN)
    folders.refuse_other(tmp_path / "absent", folders.RUN)


@pytest.mark.parametrize("what", [folders.RUN, folders.SEARCH, folders.TEXT, folders.MODEL])
def test_what_figures_cannot_be_of_is_named(what, tmp_path):
    folder = made(tmp_path / "here", what)
    says = refusal("figures", [f"--workdir={tmp_path / 'out'}", f"--source={folder}"])
    assert says.startswith(f"source={str(folder)!r} holds {what}; it may be the folder of a sweep")


@pytest.mark.parametrize(
    ("what", "name"), [(folders.RUN, "config"), (folders.SWEEP, "runs"), (folders.SEARCH, "search")]
)
def test_a_figure_is_not_written_over_what_is_none(what, name, tmp_path):
    folder = made(tmp_path / "here", what)
    (folder / "taken.csv").touch()
    (folder / "mine.json").write_text('{"figure": "escape"}')
    before = listing(folder)
    for taken, file in ((name, f"{name}.json"), ("taken", "taken.csv")):
        with pytest.raises(ConfigError, match=f"^name='{taken}' is taken: {file} in workdir="):
            figures.refuse_foreign(folder / taken)
    figures.refuse_foreign(folder / "mine")
    figures.refuse_foreign(folder / "new")
    assert listing(folder) == before


@pytest.mark.parametrize("what", [folders.SWEEP, folders.SEARCH, folders.LEGS, folders.TEXT])
@pytest.mark.parametrize(
    ("script", "flag"), [("generate", "run"), ("convert", "source"), ("analysis.margin", "runs")]
)
def test_what_is_no_run_is_not_read_as_one(script, flag, what, tmp_path):
    folder = made(tmp_path / "here", what)
    before = listing(folder)
    argv = [] if script == "generate" else [f"--workdir={tmp_path / 'out'}"]
    says = refusal(script, [f"--{flag}={folder}", *argv])
    if what == folders.TEXT:  # which has a config.json, of its own
        assert says.startswith(f"{folder}/config.json describes no run: section 'data' is not")
    else:
        assert says.startswith(f"{flag}={folder} ")
        assert "has no config.json" in says
    assert listing(folder) == before
