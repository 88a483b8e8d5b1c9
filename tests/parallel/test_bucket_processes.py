"""Processes without a disk in common, over an emulated bucket: Orbax writes there from each."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from bucket_emulator import environment as of_emulator
from parallel_process import ROOT, finish, start
from tiny_run import curve, outcome, rows_in

from experiments.lib import environment

pytestmark = pytest.mark.slow
STEPS = 40
FOLDERS = [ROOT, ROOT / "tests", environment.extra_folder("gcs")]
# What a reader says of the bucket: the step it was given, and its largest parameter.
READ = """
import sys
import jax, tiny_run
from deltaproduct_jax import load_run
from deltaproduct_jax.training import runs
runs.SequenceModel = tiny_run.TinyModel
run = load_run(sys.argv[1], "newest")
print(run.step, repr(float(abs(run.model.head.kernel[...]).max())))
"""


@pytest.fixture(scope="module")
def variables():
    """Those of processes that find an emulated bucket called bucket."""
    if not FOLDERS[-1].exists():
        pytest.skip("needs gcsfs: python3 tests/run.py --extra=gcs")
    paths = {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS))}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bucket_emulator"],
        cwd=ROOT,
        env=os.environ | paths,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as emulator:
        yield paths | of_emulator(emulator.stdout.readline().strip())
        emulator.kill()


def in_bucket(workdir, variables, bucket, *, number=2, steps=STEPS, flags=(), **more):
    return start(
        workdir,
        number,
        steps=steps,
        flags=[f"--bucket={bucket}", *flags],
        own_workdirs=True,
        all_of_them={**variables, **more.pop("all_of_them", {})},
        **more,
    )


def read(bucket, variables):
    done = subprocess.run(
        [sys.executable, "-c", READ, str(bucket)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def check_ended(processes):
    ended = finish(processes)
    assert [code for code, *_ in ended] == [0] * len(ended), ended
    return ended


def test_both_are_killed_twice_and_go_on_elsewhere_bit_for_bit(tmp_path, variables):
    undisturbed, bucket = tmp_path / "undisturbed", "gs://bucket/killed"
    check_ended(start(undisturbed, 2, steps=STEPS))
    for kill, lines in enumerate((5, 14)):
        workdir = tmp_path / f"kill{kill}"
        ones = in_bucket(workdir, variables, bucket, all_of_them={"STEP_S": "0.05"})
        metrics = workdir / "0" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert [one.poll() for one in ones] == [None, None], finish(ones)
            time.sleep(0.01)
        for one in ones:
            one.send_signal(signal.SIGKILL)
        finish(ones)
        assert not (workdir / "1").exists()
    check_ended(in_bucket(tmp_path / "last", variables, bucket))
    assert curve(rows_in(tmp_path / "last" / "0")) == curve(rows_in(undisturbed))
    assert outcome(tmp_path / "last" / "0") == outcome(undisturbed)
    starts = json.loads((tmp_path / "last" / "0" / "run.json").read_text())["starts"]
    assert len(starts) == 3
    assert starts[2]["resumed_from"] > starts[1]["resumed_from"] >= 4
    assert read(bucket, variables) == read(undisturbed, variables)


def test_sigterm_saves_there_and_one_process_ends_the_run(tmp_path, variables):
    bucket, steps = "gs://bucket/stopped", 160
    # Simulated devices end the process where too many steps are under way, so each is looked at.
    rarely = {"flags": ["--log_every=1", "--eval_every=80", "--checkpoint_every=80"]}
    first, last = in_bucket(tmp_path / "two", variables, bucket, steps=steps, ASK_AT="5", **rarely)
    said = iter(last.stdout.readline, "")
    assert any(line == "waiting\n" for line in said), finish([first, last])
    last.send_signal(signal.SIGTERM)
    last.stdin.write("\n")
    last.stdin.flush()
    stopped = finish([first, last])
    assert [code for code, *_ in stopped] == [143, 143], stopped
    assert f"the same command goes on in {bucket}" in stopped[0][2]
    at = int(read(bucket, variables).split()[0])
    assert 5 <= at < steps
    check_ended(in_bucket(tmp_path / "one", variables, bucket, steps=steps, number=1, **rarely))
    records = tmp_path / "one" / "0"
    starts = json.loads((records / "run.json").read_text())["starts"]
    assert [(s["process_count"], s["resumed_from"]) for s in starts] == [(2, None), (1, at)]
    assert rows_in(records)[-1]["step"] == steps


def test_a_bucket_that_is_not_there_is_one_line(tmp_path, variables):
    ended = finish(in_bucket(tmp_path / "run", variables, "gs://missing/run"))
    said = [errors for code, _, errors in ended if code == 2]  # who is later is ended by the other
    assert said
    for errors in said:
        assert re.search(r"error in process \d: gs://missing/run cannot be used: 404 ", errors)
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused(tmp_path, variables):
    bucket = "gs://bucket/other"
    check_ended(in_bucket(tmp_path / "run", variables, bucket, steps=6, number=1))
    ((code, _, errors),) = finish(
        in_bucket(tmp_path / "other", variables, bucket, steps=4, number=1)
    )
    assert code == 2
    assert f"error: {bucket} holds a run with another configuration, differing in steps" in errors
    assert errors.strip().endswith("give another bucket")
    assert not (tmp_path / "other").exists()
