"""SLURM through submitit, with programs that stand in for sbatch, srun, sacct and scancel."""

import os
import signal
import stat
import time

import pytest
from sweeps.helpers import needs_submitit, process, rows_in, run, starts, table, wait_until

pytestmark = [pytest.mark.slow, needs_submitit]

# Jobs are processes of this machine, known by their numbers in the folder JOBS.
SBATCH = """
id=$((100 + $(ls "$JOBS" | wc -l)))
export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0
export SLURM_LOCALID=0 SLURM_JOB_NODELIST=here
(setsid bash "$1" > "$JOBS.$id.out" 2>&1 & echo $! > "$JOBS/$id")
echo "Submitted batch job $id"
"""
SRUN = """
while [[ "$1" == --* ]]; do
  case "$1" in --output|--error) shift 2;; *) shift;; esac
done
exec "$@"
"""
SACCT = """
echo "JobID|State"
for file in "$JOBS"/*; do
  state=FAILED
  if kill -0 $(cat $file) 2> /dev/null; then state=RUNNING; fi
  echo "$(basename $file)|$state"
done
"""
SCANCEL = """
kill -TERM -- -$(cat "$JOBS/$1")
sleep 1
kill -KILL -- -$(cat "$JOBS/$1")
"""


@pytest.fixture(autouse=True)
def cluster(tmp_path, monkeypatch):
    """Puts the programs first on the path; returns the folder of the jobs' process numbers."""
    programs, jobs = tmp_path / "bin", tmp_path / "pids"
    programs.mkdir()
    jobs.mkdir()
    for name, text in zip(
        ("sbatch", "srun", "sacct", "scancel"), (SBATCH, SRUN, SACCT, SCANCEL), strict=True
    ):
        (programs / name).write_text(f"#!/bin/bash{text}")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("JOBS", str(jobs))
    return jobs


OTHERS = {"launcher": "slurm", "slurm": "slurm_partition=gpu;timeout_min=5", "workers": 2}


def test_jobs_outlive_a_killed_sweep_and_are_taken_up(tmp_path, cluster):
    fixed = "steps=400;step_ms=20;failures=0"
    first = process(tmp_path / "s", "seed=0:3", fixed=fixed, **OTHERS)
    wait_until(lambda: rows_in(tmp_path / "s") > 10)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert run(tmp_path / "s", "seed=0:3", fixed=fixed, **OTHERS) == 0
    assert starts(tmp_path / "s") == {"seed=0": 1, "seed=1": 1, "seed=2": 1}
    assert len(list(cluster.iterdir())) == 3
    assert {row["state"] for row in table(tmp_path / "s").values()} == {"done"}
    scripts = [path.read_text() for path in (tmp_path / "s" / "jobs").glob("*.sh")]
    assert all("#SBATCH --partition=gpu" in script for script in scripts)


def test_ctrl_c_cancels_the_jobs(tmp_path, cluster):
    first = process(tmp_path / "s", "seed=0:3", fixed="steps=4000;step_ms=20", **OTHERS)
    wait_until(lambda: rows_in(tmp_path / "s") > 10)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    assert len(list(cluster.iterdir())) == 2
    rows = rows_in(tmp_path / "s")
    time.sleep(1)
    assert rows_in(tmp_path / "s") == rows
    assert not list(tmp_path.glob("s/runs/*/job.json"))
    # What was cancelled on purpose has not failed.
    assert not list(tmp_path.glob("s/runs/*/attempts.jsonl"))


def test_a_lost_job_is_submitted_again(tmp_path, cluster):
    first = process(tmp_path / "s", "seed=0", fixed="steps=200;step_ms=20", retries=1, **OTHERS)
    wait_until(lambda: rows_in(tmp_path / "s") > 10)
    (job,) = cluster.iterdir()
    os.killpg(int(job.read_text()), signal.SIGKILL)  # as where a node is lost
    assert first.wait(120) == 0, first.communicate()[0]
    assert starts(tmp_path / "s") == {"seed=0": 2}
    assert "job 100 ended without a record: FAILED" in first.communicate()[0]
