"""Real processes on one machine: the run of one process, stopping together, failing together."""

import contextlib
import json
import os
import random
import signal
import threading
import time

import jax
import pytest
from parallel_process import finish, start
from tiny_run import curve, outcome, rows_in

from deltaproduct_jax.parallel import processes
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.training.locks import run_lock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(tmp_path, number):
    """One is sent a signal, both stop behind the same step, and one process ends the run."""
    workdir, steps = tmp_path / "run", 300
    first, last = start(workdir, 2, steps=steps, ASK_AT="5")
    said = iter(last.stdout.readline, "")
    assert any(line == "waiting\n" for line in said), finish([first, last])
    last.send_signal(number)
    last.stdin.write("\n")
    last.stdin.flush()
    stopped = finish([first, last])
    assert [code for code, *_ in stopped] == [143, 143], stopped
    assert "stopped by SIGTERM after step" in stopped[0][2]
    assert "stopped" not in stopped[1][2]
    at = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert 5 <= at < steps
    # One process goes on where the two stood, a little further.
    config = json.loads((workdir / "config.json").read_text())
    last_step = config["train"]["steps"] = at + 4
    (workdir / "config.json").write_text(json.dumps(config))
    ((code, said, errors),) = finish(start(workdir, 1, steps=last_step))
    assert code == 0, errors
    assert "best checkpoint" in said
    starts = json.loads((workdir / "run.json").read_text())["starts"]
    assert [s["process_count"] for s in starts] == [2, 1]
    assert starts[1]["resumed_from"] == at
    assert rows_in(workdir)[-1]["step"] == last_step
    assert any((tmp_path / "programs").iterdir())


@pytest.mark.slow
def test_the_run_is_the_same_whatever_the_number_of_processes(tmp_path):
    folders = {number: tmp_path / str(number) for number in (1, 2, 4)}
    for number, workdir in folders.items():
        ended = finish(start(workdir, number))
        assert [code for code, *_ in ended] == [0] * number, ended
        tables = ["best checkpoint" in said for _, said, _ in ended]
        assert tables == [True] + [False] * (number - 1)
    one, *others = (curve(rows_in(workdir)) for workdir in folders.values())
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert (
                b["valid_sequence_accuracy" if "valid_loss" in a else "step"]
                == (a["valid_sequence_accuracy" if "valid_loss" in a else "step"])
            )


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_within_a_minute(tmp_path):
    ended = finish(start(tmp_path / "run", 2, DIE_AT="5"), timeout=90)
    codes = [code for code, *_ in ended]
    assert codes[1] == 1
    assert codes[0] != 0
    assert "made to fail behind step 5" in ended[1][2]


@pytest.mark.slow
@pytest.mark.parametrize(("first_s", "last_s"), [(0, 0), (3, 0), (0, 3)])
def test_what_a_mesh_does_not_divide_is_one_line_of_each(tmp_path, first_s, last_s):
    """Whichever comes to it later: no process takes the others' line with it."""
    each = {"all_of_them": {"LATE_S": str(first_s)}, "LATE_S": str(last_s)}
    ended = finish(start(tmp_path / "run", 2, mesh="data:3", **each))
    assert [code for code, *_ in ended] == [2, 2], ended
    for index, (_, _, errors) in enumerate(ended):
        (line,) = errors.splitlines()
        assert line.startswith(f"error in process {index}: mesh='data:3' takes 3 of 4 devices; ")
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--mesh=fsdp:4", "mesh='data:-1,fsdp:2' here, 'fsdp:4' in process 1"),
        ("--learning_rate=1e-2", "learning_rate=0.03 here, 0.01 in process 1"),
        ("--resume_from=0", "resume_from=None here, 0 in process 1"),
    ],
)
def test_processes_that_were_given_other_flags_end_with_a_line_each(flag, text, tmp_path):
    """And do not wait for each other in programs that differ."""
    ended = finish(start(tmp_path / "run", 2, flags_of_last=[flag]), timeout=90)
    assert [code for code, *_ in ended] == [2, 2], ended
    (line,) = ended[0][2].splitlines()
    assert line.startswith(f"error in process 0: {text}; all processes take the same flags, but")
    assert "in process 0; all" in ended[1][2]
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("unable", [0, 1])
def test_what_one_process_alone_cannot_do_is_one_line_of_each(unable, tmp_path):
    """The first finds its workdir in use; or the last has one of its own, without the run."""
    with contextlib.ExitStack() as held:
        if unable == 0:
            held.enter_context(run_lock(tmp_path / "run"))
            why = f"{tmp_path / 'run'} is in use by process {os.getpid()} on "
            ones = start(tmp_path / "run", 2)
        else:
            why = f"{tmp_path / 'run/1'} does not hold the run that process 0 has begun; all proce"
            ones = start(tmp_path / "run", 2, own_workdirs=True)
        ended = finish(ones, timeout=90)
    assert [code for code, *_ in ended] == [2, 2], ended
    said = [errors.splitlines() for _, _, errors in ended]
    # A busy machine is told every ten seconds that it compiles.
    lines = [[line for line in each if not line.startswith("compiling ")] for each in said]
    assert [len(each) for each in lines] == [1, 1], ended
    (own,), (other,) = lines[unable], lines[1 - unable]
    assert own.startswith(f"error in process {unable}: {why}")
    told = f"error in process {1 - unable}: process {unable} cannot go on: "
    assert other == told + own.partition(": ")[2]


def lines_in(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_one(ones, index, condition):
    """Kills a process once the condition holds, and waits for the end of the others; if it did."""
    while ones[index].poll() is None:
        if condition():
            ones[index].send_signal(signal.SIGKILL)
            codes = [code for code, *_ in finish(ones)]
            assert codes[index] == -signal.SIGKILL
            assert 0 not in codes  # by themselves: nobody goes on alone, nobody waits for ever
            return True
        time.sleep(0.005)
    finish(ones)
    return False


# A process that is given up too soon, on a machine that is busy, would end all as well.
QUICKLY = {"HEARTBEAT_S": "15", "JOIN_S": "60", "STEP_S": "0.05"}


@pytest.mark.slow
def test_one_of_four_is_killed_ten_times_at_random_moments(tmp_path):
    """And the same command goes on, bit for bit as if nobody had."""
    killed, undisturbed, chance = tmp_path / "killed", tmp_path / "undisturbed", random.Random(0)
    steps = 160
    began = time.monotonic()
    ended = finish(start(undisturbed, 4, steps=steps), timeout=600)
    assert [code for code, *_ in ended] == [0] * 4, ended
    whole, kills = time.monotonic() - began, 0
    while kills < 10:
        end = time.monotonic() + chance.uniform(0, 0.5) * whole
        lines = lines_in(killed) + chance.randrange(1, 7)
        moments = [  # at any, starting up included, and after some progress
            lambda end=end: time.monotonic() > end,
            lambda lines=lines: lines_in(killed) >= lines,
        ]
        ones = start(killed, 4, steps=steps, all_of_them=QUICKLY)
        if not kill_one(ones, chance.randrange(4), moments[kills % 2]):
            break
        kills += 1
    assert kills == 10
    ended = finish(start(killed, 4, steps=steps), timeout=600)
    assert [code for code, *_ in ended] == [0] * 4, ended
    assert curve(rows_in(killed)) == curve(rows_in(undisturbed))
    assert outcome(killed) == outcome(undisturbed)
    names = [sorted(p.name for p in (w / "checkpoints").iterdir()) for w in (killed, undisturbed)]
    assert names[0] == names[1]


def test_waiting_for_others_that_do_not_come_ends_with_a_line(monkeypatch, capsys):
    ended, codes = threading.Event(), []
    monkeypatch.setattr(processes, "INITIALIZATION_TIMEOUT_S", 0.05)
    monkeypatch.setattr(processes.os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: ended.wait(timeout=60))
    processes.join(DeviceConfig(coordinator_address="host:1", num_processes=2, process_id=0))
    assert codes == [processes.GIVEN_UP]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: coordinator_address='host:1' has not brought all processes tog")
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    processes.join(DeviceConfig(coordinator_address="host:1", num_processes=2, process_id=0))
    time.sleep(0.1)
    assert len(codes) == 1  # all have come


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 1])
def test_a_process_that_is_alone_ends_before_jax_would(missing, tmp_path):
    ones = start(tmp_path / "run", 2, all_of_them={"JOIN_S": "5"})
    ones[missing].kill()
    code, out, err = finish(ones)[1 - missing]
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "has not brought all processes together in 5 s" in line


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_a_run_goes_on_in_another_number_of_processes(tmp_path, before, after):
    """Of the same devices, and of twice as many."""
    undisturbed = tmp_path / "undisturbed"
    ended = finish(start(undisturbed, before, steps=40))
    assert [code for code, *_ in ended] == [0] * before, ended
    for devices in (4, 8):
        workdir = tmp_path / str(devices)
        ones = start(workdir, before, steps=40, all_of_them=QUICKLY)
        assert kill_one(ones, before - 1, lambda w=workdir: lines_in(w) >= 8)
        ended = finish(start(workdir, after, steps=40, devices=devices))
        assert [code for code, *_ in ended] == [0] * after, ended
        starts = json.loads((workdir / "run.json").read_text())["starts"]
        assert [entry["process_count"] for entry in starts] == [before, after]
        assert starts[1]["resumed_from"] >= 6
        for a, b in zip(rows_in(workdir), rows_in(undisturbed), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
def test_processes_as_slices(tmp_path):
    """What each holds lies together: fsdp within a process, data across."""
    workdir = tmp_path / "run"
    flags = ["--dcn_mesh=data:2"]
    ended = finish(start(workdir, 2, mesh="fsdp:2", flags=flags))
    assert [code for code, *_ in ended] == [0, 0], ended
    (entry,) = json.loads((workdir / "run.json").read_text())["starts"]
    assert entry["mesh"] == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
    ended = finish(start(tmp_path / "none", 2, mesh="fsdp:2", flags=["--dcn_mesh=data:3"]))
    assert ended[1][0] == 2
    assert "dcn_mesh='data:3' takes 3 slices or processes; there are 2" in ended[1][2]
