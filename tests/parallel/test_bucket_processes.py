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


@pytest.mark.parametrize(
    ("bucket", "flags", "named"),
    [
        ("gs://missing/run", [], "bucket=gs://missing/run cannot be used: 404 "),
        ("gs://bucket/run", ["--compilation_cache=gs://missing"], "compilation_cache='gs://missin"),
    ],
)
def test_a_bucket_that_is_not_there_is_one_line(bucket, flags, named, tmp_path, variables):
    ended = finish(in_bucket(tmp_path / "run", variables, bucket, flags=flags))
    assert [code for code, *_ in ended] == [2, 2], ended
    for _, _, errors in ended:
        (line,) = errors.splitlines()
        assert re.match(rf"error( in process \d)?: {named}", line)
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused(tmp_path, variables):
    """In the root of a bucket, which is a place as any folder of it."""
    bucket = "gs://bucket"
    check_ended(in_bucket(tmp_path / "run", variables, bucket, steps=6, number=1))
    ((code, _, errors),) = finish(
        in_bucket(tmp_path / "other", variables, bucket, steps=4, number=1)
    )
    assert code == 2
    assert f"error: {bucket} holds a run with another configuration, differing in steps" in errors
    assert errors.strip().endswith("give another bucket")
    assert not (tmp_path / "other").exists()
    assert read(bucket, variables).startswith("6 ")


SMALL = {
    "train_length": 16, "eval_lengths": 16, "hidden_size": 8, "num_heads": 1, "head_dim": 8,
    "intermediate_size": 8, "implementation": "recurrent", "chunk_size": "none", "batch_size": 4,
    "eval_sequences": 4, "eval_batch_size": 4, "eval_every": 2, "checkpoint_every": 4, "steps": 4,
    "warmup_steps": 0,
}  # fmt: skip
PLAIN = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HF_DATASETS_OFFLINE": "1"}
TASK = """task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{rest}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def run(variables, script, *flags):
    """Exit code, output and errors of a command."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{script}", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | variables | PLAIN,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_what_reads_models_reads_them_from_there(tmp_path, variables):
    """Text, a folder for other projects, a run to go on with, scores: as from a disk."""
    extra = environment.extra_folder("evaluation")
    if not extra.exists():
        pytest.skip("needs lm_eval: python3 tests/run.py --extra=evaluation")
    paths = os.pathsep.join([variables["PYTHONPATH"], str(extra)])
    variables |= {"PYTHONPATH": paths, "HF_HOME": str(tmp_path / "hf")}
    disk, bucket = tmp_path / "run", "gs://bucket/text"
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    small.append(f"--compilation_cache={tmp_path / 'programs'}")
    for more in ([f"--workdir={disk}"], [f"--workdir={tmp_path / 'own'}", f"--bucket={bucket}"]):
        code, _, errors = run(variables, "language_modeling", *small, *more)
        assert code == 0, errors
    (tmp_path / "data.jsonl").write_text('{"text": "def", "rest": " f"}\n')
    (tmp_path / "own.yaml").write_text(TASK.format(path=tmp_path / "data.jsonl"))
    found = {}
    for name, place in (("disk", disk), ("bucket", bucket)):
        there = tmp_path / name
        for script, *flags in (
            ("generate", f"--run={place}", "--prompt=def ", "--max_tokens=4"),
            ("convert", f"--source={place}", f"--workdir={there / 'fla'}"),
            (
                "convert", f"--source={disk}", "--to=run", f"--like={place}", "--checkpoint=newest",
                f"--workdir={there / 'again'}",
            ),
            (
                "evaluate", f"--model={place}", "--tasks=own", f"--include_path={tmp_path}",
                f"--workdir={there / 'scores'}",
            ),
            (
                "analysis.length_extrapolation", f"--runs={place}", "--length=32", "--window=16",
                "--rows=2", f"--workdir={there / 'lengths'}",
            ),
        ):  # fmt: skip
            code, said, errors = run(variables, script, *flags)
            assert code == 0, errors
            found.setdefault(script, []).append(said)
    assert found["generate"][0] == found["generate"][1]
    assert found["generate"][0].startswith("def ")
    for path in ("fla/model.safetensors", "fla/config.json", "again/config.json"):
        one, other = (tmp_path / name / path for name in ("disk", "bucket"))
        assert one.read_bytes() == other.read_bytes()
    scores = [
        json.loads((tmp_path / name / "scores/results.json").read_text())["results"]["own"]
        for name in ("disk", "bucket")
    ]
    assert scores[0] == scores[1]
    for script, flag in (("generate", "run"), ("convert", "source"), ("evaluate", "model")):
        more = {"evaluate": ["--tasks=own", f"--include_path={tmp_path}"]}.get(script, [])
        more += [] if script == "generate" else [f"--workdir={tmp_path / 'none'}"]
        code, _, errors = run(variables, script, f"--{flag}=gs://bucket/none", *more)
        assert (code, errors.strip().splitlines()[-1]) == (
            2,
            f"error: {flag}=gs://bucket/none has no config.json; it may be a run directory, or a "
            "folder of flash-linear-attention",
        )
