"""Real processes on one machine: the run of one process, stopping together, failing together."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import curve, flags_for

ROOT = Path(__file__).resolve().parents[2]
MESH = "data:-1,fsdp:2"


def start(workdir: Path, number: int, *, mesh: str = MESH, devices: int = 4, steps=12, **extra):
    """Starts the processes of a run, with ``devices`` in all; ``extra`` is for the last of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // number}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    fields = {"hidden_size": 16, "num_heads": 2, "schedule": "constant", "steps": steps}
    cache = f"--compilation_cache={workdir.parent / 'programs'}"
    flags = [*flags_for(workdir, **fields), f"--mesh={mesh}", cache]
    joining = [f"--coordinator_address={address}", f"--num_processes={number}"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel_process", *flags]
            + ([*joining, f"--process_id={index}"] if number > 1 else []),
            cwd=ROOT,
            env=environment | (extra if index == number - 1 else {}),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(number)
    ]


def finish(processes, timeout=240):
    """Exit code, output and errors of each."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


def rows_in(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
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
def test_what_a_mesh_does_not_divide_is_one_line_of_each(tmp_path):
    ended = finish(start(tmp_path / "run", 2, mesh="data:3"))
    assert [code for code, *_ in ended][1] == 2
    assert "takes 3 of 4 devices; with several processes it must take all" in ended[1][2]
    assert not (tmp_path / "run/config.json").exists()
