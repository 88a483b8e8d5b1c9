"""Jobs of a cluster, with a stand-in for submitit: submitted once, taken up, lost and cancelled."""

import json
import signal
import sys
import types

import pytest

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.training.locks import Lock
from experiments.lib.sweeps import attempts, grid, launchers, records

RESULTS = {"steps": 3, "best_step": 3, "parameters": {"total": 7}, "test": []}


class Cluster:
    """Module submitit as far as it is used, and the jobs that it was given."""

    def __init__(self):
        self.jobs, self.parameters, self.states = {}, {}, {}
        cluster = self

        class Job:
            def __init__(self, folder, job_id):
                self.folder, self.job_id = folder, job_id

            @property
            def state(self):
                return cluster.states[self.job_id]

            def done(self):
                return self.state not in ("PENDING", "RUNNING")

            def cancel(self, check):
                cluster.states[self.job_id] = "CANCELLED"

        class AutoExecutor:
            def __init__(self, folder, cluster):
                if cluster not in ("slurm", "local"):
                    raise ValueError(f"unknown cluster {cluster}")
                self._executor = types.SimpleNamespace(job_class=Job, folder=folder)

            def update_parameters(self, **given):
                cluster.parameters |= given

            def submit(self, function, *arguments):
                job = Job(self._executor.folder, str(101 + len(cluster.jobs)))
                cluster.jobs[job.job_id] = function, arguments
                cluster.states[job.job_id] = "PENDING"
                return job

        self.AutoExecutor = AutoExecutor


@pytest.fixture
def cluster(monkeypatch):
    made = Cluster()
    monkeypatch.setitem(sys.modules, "submitit", made)
    return made


@pytest.fixture
def folder(tmp_path):
    run = grid.Run("seed=0", {"seed": "0"}, ("seed",), {"train": {"seed": 0}})
    found = records.RunFolder(tmp_path, run)
    found.path.mkdir(parents=True)
    return found


def launcher(tmp_path, parameters=""):
    return launchers.SubmititLauncher("state_tracking", parameters, tmp_path, ["--mesh=fsdp:-1"])


def saved_job(folder):
    path = folder.path / launchers.JOB
    return json.loads(path.read_text())["job_id"] if path.exists() else None


def test_parameters_are_numbers_where_they_are_some(cluster, tmp_path):
    launcher(tmp_path, "slurm_partition=gpu;gpus_per_node=2;slurm_mem=²;nodes=1")
    given = {"slurm_partition": "gpu", "gpus_per_node": 2, "slurm_mem": "²", "nodes": 1}
    assert cluster.parameters == {"name": "state_tracking", "timeout_min": 1440, **given}
    launcher(tmp_path, "cluster=local;timeout_min=5")
    assert cluster.parameters["timeout_min"] == 5
    assert "cluster" not in cluster.parameters


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("nodes=2", "slurm='nodes=2': nodes may be 1, since a run of a sweep is one process"),
        ("tasks_per_node=0", "tasks_per_node may be 1"),
        ("cluster=cloud", "slurm='cluster=cloud' is refused by submitit: unknown cluster cloud"),
        ("timeout_min", "--slurm='timeout_min': 'timeout_min' must be key=value"),
    ],
)
def test_jobs_that_cannot_be(parameters, says, cluster, tmp_path):
    with pytest.raises(ConfigError, match=says):
        launcher(tmp_path, parameters)
    assert not cluster.jobs


def test_a_job_that_the_cluster_refuses_is_one_line(cluster, folder, tmp_path, monkeypatch):
    def refuse(self, *arguments):
        raise RuntimeError("sbatch: error: invalid account\n  or partition")

    monkeypatch.setattr(cluster.AutoExecutor, "submit", refuse)
    says = "^slurm='slurm_partition=x': a job is refused: sbatch: error: .* account or partition$"
    with pytest.raises(ConfigError, match=says):
        launcher(tmp_path, "slurm_partition=x").start([folder], 0)
    assert saved_job(folder) is None
    assert not Lock(folder.path / attempts.CLAIM).is_held()


def test_a_run_is_submitted_once_and_taken_up_by_other_sweeps(cluster, folder, tmp_path):
    first = launcher(tmp_path).start([folder], 0)
    assert saved_job(folder) == "101"
    function, arguments = cluster.jobs["101"]
    assert (function, arguments[0]) == (launchers.run_in_job, "state_tracking")
    assert arguments[1:] == (folder, ["--mesh=fsdp:-1"])
    assert not Lock(folder.path / attempts.CLAIM).is_held()  # the job itself will take it
    cluster.states["101"] = "RUNNING"
    claim = Lock(folder.path / attempts.CLAIM)
    assert claim.acquire()  # as it has now
    other = launcher(tmp_path).start([folder], 1)
    claim.release()
    assert list(cluster.jobs) == ["101"]
    assert first.folders == other.folders == [folder]
    assert first.poll() is other.poll() is None


def test_of_two_sweeps_at_the_same_moment_one_submits(cluster, folder, tmp_path, monkeypatch):
    ours, theirs = launcher(tmp_path), launcher(tmp_path)
    look, looks = ours._submitted, []

    def submitted(folder):
        found = look(folder)
        if not looks:  # the other has looked too by then, and is the first to submit
            theirs.start([folder], 0)
        looks.append(found)
        return found

    monkeypatch.setattr(ours, "_submitted", submitted)
    job = ours.start([folder], 0)
    assert (len(looks), list(cluster.jobs)) == (2, ["101"])
    cluster.states["101"] = "COMPLETED"
    assert job.poll() == ["job 101 ended without a record: COMPLETED"]


def test_a_job_that_said_how_it_ended_is_believed(cluster, folder, tmp_path):
    job = launcher(tmp_path).start([folder], 0)
    folder.add_attempt(1, 3.0, "error: out of memory")
    cluster.states["101"] = "FAILED"
    assert job.poll() == ["error: out of memory"]
    assert len(folder.attempts()) == 1
    assert saved_job(folder) is None
    again = launcher(tmp_path).start([folder], 0)
    assert saved_job(folder) == "102"
    (folder.path / "results.json").write_text(json.dumps(RESULTS))
    cluster.states["102"] = "COMPLETED"
    assert again.poll() == [""]
    assert launcher(tmp_path).start([folder], 0) is None  # it is done


def test_a_lost_job_counts_as_an_attempt_and_says_its_state(cluster, folder, tmp_path):
    job = launcher(tmp_path).start([folder], 0)
    cluster.states["101"] = "NODE_FAIL"
    assert job.poll() == ["job 101 ended without a record: NODE_FAIL"]
    (attempt,) = folder.attempts()
    assert (attempt["exit_code"], attempt["error"]) == (
        1,
        "job 101 ended without a record: NODE_FAIL",
    )
    assert launcher(tmp_path).start([folder], 0) is not None
    assert saved_job(folder) == "102"


def test_a_job_that_ended_out_of_sight_is_submitted_again(cluster, folder, tmp_path):
    launcher(tmp_path).start([folder], 0)
    cluster.states["101"] = "TIMEOUT"
    launcher(tmp_path).start([folder], 0)
    assert saved_job(folder) == "102"


def test_a_stopped_sweep_cancels_its_jobs_which_count_for_nothing(cluster, folder, tmp_path):
    job = launcher(tmp_path).start([folder], 0)
    job.ask_to_stop()
    assert cluster.states["101"] == "PENDING"
    job.stop()
    assert cluster.states["101"] == "CANCELLED"
    assert (saved_job(folder), folder.attempts()) == (None, [])


def test_a_run_that_a_process_here_is_at_is_not_submitted(cluster, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "Claims", lambda folders: types.SimpleNamespace(
        folders=[], release=lambda: None
    ))  # fmt: skip
    assert launcher(tmp_path).start([folder], 0) is None
    assert not cluster.jobs


class Attempt:
    """In the place of an attempt that is under way: it has ended with a code."""

    def __init__(self, code):
        self.process = types.SimpleNamespace(poll=lambda: code, returncode=code)
        self.is_stopped = False

    def poll(self):
        return ["error: it died"]

    def stop(self):
        self.is_stopped = True


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, "error: it died"),
        (-signal.SIGKILL, "error: it died"),
        (-signal.SIGTERM, None),  # with the whole job, which says nothing then
        (128 + signal.SIGTERM, None),
    ],
)
def test_a_job_makes_one_attempt_and_leaves_nothing_running(code, said, folder, monkeypatch):
    attempt, asked = Attempt(code), []

    def begin(script, folder, variables, devices, *, new_session):
        asked.append((script, devices, new_session))
        return attempt if len(asked) > 1 else None  # the sweep has the claim at first

    monkeypatch.setattr(launchers, "begin", begin)
    monkeypatch.setattr(launchers.time, "sleep", lambda seconds: None)
    assert launchers.run_in_job("recall", folder, ["--mesh=data:1"]) == said
    assert asked == [("recall", ["--mesh=data:1"], False)] * 2
    assert attempt.is_stopped


def test_a_job_that_comes_too_late_does_nothing(folder, monkeypatch):
    seconds = iter(range(0, 1000, 4))
    monkeypatch.setattr(launchers, "begin", lambda *_, **__: None)
    monkeypatch.setattr(launchers, "time", types.SimpleNamespace(
        monotonic=lambda: float(next(seconds)), sleep=lambda seconds: None
    ))  # fmt: skip
    assert launchers.run_in_job("recall", folder, []) is None  # somebody else stays at it
    (folder.path / "results.json").write_text(json.dumps(RESULTS))
    assert launchers.run_in_job("recall", folder, []) == ""
