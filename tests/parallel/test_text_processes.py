"""Text over real processes: killed in the middle of an epoch, gone on with on another number."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from parallel_process import ROOT, address_and_environment
from tiny_run import curve

FLAGS = [
    "--preset=tiny", "--hidden_size=16", "--steps=40", "--log_every=1", "--eval_every=20",
    "--checkpoint_every=5", "--warmup_steps=0", "--eval_sequences=8", "--train_length=32",
    "--eval_lengths=32", "--select_length=32", "--mesh=data:-1,fsdp:2", "--optimizer=adamw",
]  # fmt: skip


def start(workdir, number):
    """The processes of a run, with four devices in all."""
    address, environment = address_and_environment(4 // number)
    environment["SCRIPT"] = "language_modeling"
    joining = [f"--coordinator_address={address}", f"--num_processes={number}"]
    command = [sys.executable, "-m", "tests.parallel_process", *FLAGS, f"--workdir={workdir}"]
    return [
        subprocess.Popen(
            command + ([*joining, f"--process_id={index}"] if number > 1 else []),
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(number)
    ]


def finish(processes):
    said = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said


def rows_in(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def newest(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(map(int, names), default=0)


@pytest.mark.slow
def test_killed_on_two_processes_and_gone_on_with_on_others(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, 1))
    processes = start(killed, 2)
    while newest(killed) < 10 and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 10 <= newest(killed) < 40, rows_in(killed)
    wanted = curve(rows_in(whole))
    for number in (1, 2, 4):
        again = shutil.copytree(killed, tmp_path / f"again{number}")
        finish(start(again, number))
        starts = json.loads((again / "run.json").read_text())["starts"]
        assert starts[-1]["resumed_from"] >= 10
        for row, want in zip(curve(rows_in(again)), wanted, strict=True):
            for name in ("loss", "valid_loss"):
                assert row.get(name, 0) == pytest.approx(want.get(name, 0), rel=1e-4)
