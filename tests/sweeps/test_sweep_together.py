"""Sweeps whose runs train together, the GPUs of workers, and runs that end with their sweep."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import tiny_run
from sweeps.helpers import ROOT, table, wait_until
from tiny_run import curve, flags_for

from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.training import loop, stopping
from deltaproduct_jax.training.locks import Lock
from experiments import sweep, together
from experiments.lib import parent
from experiments.lib.sweeps import gpus, grid, launchers, records, view
from experiments.lib.sweeps.scheduler import Scheduler

TINY = {"train_length": 2, "eval_lengths": (2, 3), "steps": 8}


def fixed_settings(**fields):
    """The tiny run as --fixed writes it, without what the grid has."""
    settings = dict(flag[2:].split("=", 1) for flag in flags_for(".", **(TINY | fields)))
    for name in ("workdir", "seed", "learning_rate", "adam_b1"):
        del settings[name]
    return ";".join(f"{name}={value}" for name, value in settings.items())


GRID = "learning_rate=0.03,0.1;seed=0:2"


def entries_in(folder, *grids, **fields):
    runs = grid.claim(folder, "state_tracking", grids, fixed_settings(**fields))
    return [view.Entry(records.RunFolder(folder, run)) for run in runs]


def test_what_differs_in_numbers_goes_together(tmp_path):
    entries = entries_in(tmp_path, GRID, "learning_rate=0.1;seed=0:3;adam_b1=0.5")
    launcher = launchers.TogetherLauncher(tmp_path, 1, (), 3)
    names = [[entry.name for entry in unit] for unit in launcher.units(entries)]
    assert names == [
        ["learning_rate=0.03,seed=0", "learning_rate=0.03,seed=1"],
        ["learning_rate=0.1,seed=0", "learning_rate=0.1,seed=1"],
        [f"learning_rate=0.1,seed={seed},adam_b1=0.5" for seed in range(3)],
    ]


def test_a_process_takes_the_runs_that_nobody_is_at(tmp_path, monkeypatch):
    entries = entries_in(tmp_path, GRID)
    commands = []
    monkeypatch.setattr(launchers, "TOGETHER", "platform")  # a module that ends at once
    begin = launchers.begin_process
    monkeypatch.setattr(
        launchers,
        "begin_process",
        lambda claims, command, *a, **k: (
            commands.append(command) or begin(claims, command, *a, **k)
        ),
    )
    elsewhere = Lock(entries[1].folder.path / ".claim")
    assert elsewhere.acquire()
    launcher = launchers.TogetherLauncher(tmp_path, 1, (), 64)
    attempt = launcher.start([entry.folder for entry in entries], 0)
    ours = [entries[index].folder for index in (0, 2, 3)]
    assert attempt.folders == ours
    assert commands[0][1:] == [f"--workdir={tmp_path}", *(f"--run={f.run.name}" for f in ours)]
    with open(ours[1].path / "log.txt", "a") as log:
        log.write("error: this run alone broke down\n")
    attempt.process.wait()
    first, second, _ = attempt.poll()
    assert first == "ended without results.json, with exit code 0"
    assert second == "error: this run alone broke down"
    assert [folder.state() for folder in ours] == ["failed"] * 3
    assert not Lock(ours[0].path / ".claim").is_held()


def test_a_group_shrinks_to_what_is_left_to_do(tmp_path):
    """One run is done, one fails and is tried again alone, one is elsewhere."""
    entries = entries_in(tmp_path, GRID)
    asked = []

    class Ended:
        def __init__(self, folders):
            self.folders = folders

        def poll(self):
            return ["", *["error: x"] * (len(self.folders) - 1)]

    def start(folders, slot):
        asked.append([folder.run.name[-1] for folder in folders])
        (folders[0].path).mkdir(parents=True, exist_ok=True)
        end = {"steps": 8, "best_step": 8, "parameters": {}, "test": []}
        (folders[0].path / "results.json").write_text(json.dumps(end))
        return Ended(folders[:3])

    scheduler = Scheduler([entries], start, 1, retries=1, changed=lambda: None)
    assert scheduler.step()
    assert [entry.state for entry in entries] == ["running"] * 3 + ["elsewhere"]
    assert scheduler.step()
    assert [len(names) for names in asked] == [4, 2]
    assert [entry.state for entry in entries] == ["done", "running", "running", "elsewhere"]
    scheduler.step()
    assert [entry.state for entry in entries][:3] == ["done", "done", "failed"]


@pytest.fixture
def tiny_model(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
    with tiny_run.compiled_once(tmp_path / "compiled"):
        yield


def test_the_command_leaves_what_runs_leave(tmp_path, tiny_model, capsys):
    first, second = entries_in(tmp_path, "learning_rate=0.1;seed=0:2")
    argv = [f"--workdir={tmp_path}", f"--run={first.name}", f"--run={second.name}"]
    broken = second.folder.path / "results.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        together.main(argv)
    assert stopped.value.code == 1
    assert {"results.json", "cumulative.png"} <= {p.name for p in first.folder.path.iterdir()}
    assert "best checkpoint: step" in (first.folder.path / "log.txt").read_text()
    assert "error: " in (second.folder.path / "log.txt").read_text()
    said = capsys.readouterr().err
    assert "step 8/8  1 runs  loss" in said
    why = f"error: run='{second.name}' has failed; {second.folder.path / 'log.txt'} says why\n"
    assert said.endswith(why)
    assert together.main([*argv[:1], "--run=none"]) == 2
    assert "run='none' is no run of the sweep in" in capsys.readouterr().err
    saved = json.loads((tmp_path / "runs.json").read_text())
    saved["runs"][0]["config"] = {}
    (tmp_path / "runs.json").write_text(json.dumps(saved))
    assert together.main(argv) == 2
    assert f"runs.json: config of '{first.name}': its sections must be" in capsys.readouterr().err
    saved["script"] = "../x"
    (tmp_path / "runs.json").write_text(json.dumps(saved))
    assert together.main(argv) == 2
    known = "formal_languages, language_modeling, recall, state_tracking, train, or a module"
    assert f"script='../x' is not known; it may be one of {known}" in capsys.readouterr().err
    assert together.main([f"--workdir={tmp_path / 'none'}", "--run=x"]) == 2
    assert "none has no runs.json; it may be the folder of a sweep" in capsys.readouterr().err


def test_each_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-7, 6,-1,3")
    assert gpus.visible_gpus() == ["4", "5", "GPU-7", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    assert gpus.visible_gpus() == []
    for name in ("nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpus.visible_gpus() == ["2", "10"]
    seen = []
    monkeypatch.setattr(launchers, "begin", lambda script, folder, variables, *_, **__: seen.append(
        variables.get("CUDA_VISIBLE_DEVICES")
    ))  # fmt: skip
    for workers, given in ((3, ()), (3, (7,)), (1, ())):
        launcher = launchers.LocalLauncher("script", workers, given)
        for slot in range(workers):
            launcher.start([None], slot)
    assert seen == ["2", "10", "2", "7", "7", "7", None]
    # Those who spread runs over devices share all of them.
    four = ["0", "1", "2", "3"]
    assert [gpus.share_of(slot, 2, four) for slot in range(2)] == [["0", "2"], ["1", "3"]]
    assert [gpus.share_of(slot, 3, four[:1]) for slot in range(3)] == [["0"]] * 3
    assert gpus.share_of(0, 1, four) == four
    assert gpus.share_of(1, 2, []) == []


CHILD = """
import pathlib, signal, sys, time
from experiments.lib.parent import end_with_parent
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append("told"))
end_with_parent()
if not told:
    pathlib.Path(sys.argv[1], "up").touch()
    while not told:
        time.sleep(0.01)
    time.sleep(0.2)
written = pathlib.Path(sys.argv[1], ".told")
written.write_text(" ".join(told))
written.rename(written.with_name("told"))  # there is no moment at which it is empty
"""
# Its threads do not die at the same moment.
SWEEP = """
import os, subprocess, sys, threading, time
from experiments.lib.parent import marked
for _ in range(64):
    threading.Thread(target=time.sleep, args=(60,)).start()
command = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
subprocess.run(command, env=marked(dict(os.environ)), start_new_session=True)
"""


def test_a_run_is_told_once_when_its_sweep_is_killed(tmp_path):
    command = [sys.executable, "-c", SWEEP, CHILD, str(tmp_path)]
    sweeping = subprocess.Popen(command, cwd=ROOT)
    wait_until((tmp_path / "up").exists)
    sweeping.send_signal(signal.SIGKILL)
    sweeping.wait()
    wait_until((tmp_path / "told").exists)
    assert (tmp_path / "told").read_text() == "told"


def test_a_run_whose_sweep_is_gone_does_not_begin(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {parent.VARIABLE: "1"}, check=False)
    assert done.returncode == 0
    assert (tmp_path / "told").read_text() == "told"
    assert not (tmp_path / "up").exists()


def test_every_command_asks_to_be_told(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr("experiments.lib.flags.end_with_parent", told.append)
    assert sweep.main([f"--workdir={tmp_path}", "--workers=0"]) == 2
    assert told == [stopping.was_asked]


def test_a_run_that_its_sweep_has_told_is_not_told_again(monkeypatch):
    """The sweep dies while the run saves."""
    told, asked = [], threading.Event()
    monkeypatch.setattr(parent, "_tell", lambda: told.append(True))
    monkeypatch.setattr(stopping, "_asked", asked)
    parent._watch(-1, stopping.was_asked)
    assert told == [True]
    with stopping.stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.wait(5)
        parent._watch(-1, stopping.was_asked)
    assert told == [True]


REAL = {
    "num_heads": 1, "head_dim": 8, "intermediate_size": 8, "implementation": "recurrent",
    "group": "Z3", "hidden_size": 8, "steps": 400, "eval_every": 20, "checkpoint_every": 70,
}  # fmt: skip


# What a run on text has beside these settings, in the place of those of a task.
TEXT = "data=stdlib;packing=first_fit;train_length=16;eval_lengths=16"
OF_TASK = {field.name for field in dataclasses.fields(GroupTask)}


def sweep_of(workdir, launcher, script):
    values, rates = fixed_settings(**REAL), "0.03,0.1"
    if script == "language_modeling":
        # Adam makes a step of mere rounding where a gradient is next to nothing, as of rare tokens.
        rates = "0.001,0.003"
        kept = [text for text in values.split(";") if text.split("=")[0] not in OF_TASK]
        values = ";".join([*kept, TEXT])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment |= {"XLA_FLAGS": ""}
    command = [sys.executable, "-m", "experiments.sweep", f"--workdir={workdir}"]
    command += [
        f"--script={script}",
        f"--grid=seed=0;learning_rate={rates}",
        f"--fixed={values}",
        f"--launcher={launcher}",
    ]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["state_tracking", "language_modeling"])
def test_a_sweep_together_is_the_sweep_of_single_runs(tmp_path, script):
    """It is killed in between, goes on together, and its runs' losses are those of runs alone."""
    killed = sweep_of(tmp_path / "vmap", "vmap", script)
    rows = lambda path: (path / "metrics.jsonl").read_text().splitlines()
    folder = tmp_path / "vmap" / "runs"
    begun = lambda: [path for path in folder.glob("*") if (path / "metrics.jsonl").exists()]
    wait_until(lambda: len(begun()) == 2 and all(len(rows(path)) > 20 for path in begun()), 300)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_until(lambda: not any(Lock(path / ".lock").is_held() for path in begun()), 60)
    assert all("stopped by SIGTERM" not in (path / "log.txt").read_text() for path in begun())
    (log,) = (tmp_path / "vmap" / "groups").iterdir()
    assert re.search(r"stopped by SIGTERM after step \d+ of 400", log.read_text())
    assert sweep_of(tmp_path / "vmap", "vmap", script).wait() == 0
    assert sweep_of(tmp_path / "local", "local", script).wait() == 0
    assert {row["state"] for row in table(tmp_path / "vmap").values()} == {"done"}
    for name in table(tmp_path / "local"):
        found, wanted = (
            curve([json.loads(line) for line in rows(tmp_path / launcher / "runs" / name)])
            for launcher in ("vmap", "local")
        )
        assert [row["step"] for row in found] == [row["step"] for row in wanted]
        losses = [[row["loss"] for row in rows[:5]] for rows in (found, wanted)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # later ones drift apart
