"""Sweeps: expanded and checked first, resumed after anything, no run lost and none run twice."""

import json
import re
import subprocess
import sys

import pytest
from sweeps.helpers import SCRIPT, names, needs_submitit, run, starts, table

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.training.locks import Lock
from experiments import sweep
from experiments.lib.sweeps import attempts as sweep_attempts
from experiments.lib.sweeps import grid as sweep_grid
from experiments.lib.sweeps import records as sweep_records
from experiments.lib.sweeps import running
from experiments.lib.sweeps.scheduler import Scheduler


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=0:3", {"seed": ["0", "1", "2"]}),
        ("seed=0:10:5", {"seed": ["0", "5"]}),
        ("seed=-1:1,7", {"seed": ["-1", "0", "7"]}),
        ("group=S3, S4 ; seed=1", {"group": ["S3", "S4"], "seed": ["1"]}),
        ("lengths=(4,8),(),2", {"lengths": ["4,8", "", "2"]}),
        ("clip=none,1e-3", {"clip": ["none", "1e-3"]}),
        ("seed=1;", {"seed": ["1"]}),
    ],
)
def test_grids_are_read(text, values):
    assert sweep_grid.parse_grid("--grid", text) == values


def test_expansion(tmp_path):
    grids = ["group=S3,A5;seed=0:2", "lengths=(4,8);seed=1", "seed=1;group=S3"]
    runs = sweep_grid.expand(SCRIPT, grids, "steps=5;rate=1")
    assert [run.name for run in runs] == [
        "group=S3,seed=0", "group=S3,seed=1", "group=A5,seed=0", "group=A5,seed=1",
        "lengths=4-8,seed=1",
    ]  # fmt: skip
    assert runs[2].settings == {"steps": "5", "rate": "1", "group": "A5", "seed": "0"}
    assert runs[4].argv() == ["--steps=5", "--rate=1", "--lengths=4,8", "--seed=1"]
    assert runs[4].config["task"] == {"group": "S3", "lengths": [4, 8]}
    assert runs[4].config["train"] | {"steps": 5, "rate": 1.0, "seed": 1} == runs[4].config["train"]


def test_names_are_short_and_differ():
    runs = sweep_grid.expand(SCRIPT, [f"group=a/b,a b,{'x' * 400},{'x' * 399}y"], "")
    assert [run.name for run in runs[:2]] == ["group=a-b", "group=a-b~2"]
    assert len({run.name for run in runs}) == 4
    assert all(len(run.name) < 200 for run in runs)


def test_presets_are_settings():
    short, long = sweep_grid.expand(SCRIPT, ["preset=default,long"], "")
    assert (short.config["train"]["steps"], long.config["train"]["steps"]) == (3, 9)


REFUSED = {
    "unknown key": (["sead=1"], {}, r"--grid: 'sead' is no setting of .*; did you mean 'seed'"),
    "unknown fixed": (["seed=1"], {"fixed": "step=1"}, r"--fixed: 'step' is no .* mean 'steps'"),
    "bad value": (["seed=1,x"], {}, r"run --seed=x: flag --seed=x: it must be a whole number"),
    "senseless value": (["seed=1;steps=3,0"], {}, r"--steps=0: steps=0 is too small"),
    "run directory": (["workdir=a,b"], {}, r"--grid: 'workdir' is no setting"),
    "twice": (["seed=1;seed=2"], {}, r"has 'seed' twice"),
    "twice fixed": (["seed=1"], {"fixed": "rate=1;rate=2"}, r"has 'rate' twice"),
    "in both": (["seed=1"], {"fixed": "seed=2"}, r"'seed' is in both --grid and --fixed"),
    "no values": (["seed"], {}, r"'seed' must be key=value"),
    "empty": ([" ; "], {}, r"is empty; it may be seed=0:5"),
    "empty range": (["seed=3:3"], {}, r"range 3:3 is empty"),
    "parentheses": (["lengths=(4,8"], {}, r"parentheses of '\(4,8' do not match"),
    "no grid": ([], {}, r"--grid is missing: .* holds no sweep to go on with"),
    "fixed alone": ([], {"fixed": "seed=1"}, r"--grid is missing"),
    "unknown launcher": (["seed=1"], {"launcher": "cloud"}, r"launcher='cloud' is not known"),
    "no workers": (["seed=1"], {"workers": "0"}, r"workers=0 is too small"),
    "no such gpu": (["seed=1"], {"gpus": "0,-1"}, r"gpus=-1 is too small"),
    "idle slurm": (["seed=1"], {"slurm": "cluster=local"}, r"slurm=.* needs launcher=slurm"),
    "idle devices": (["seed=1"], {"launcher": "none", "devices": "mesh=data:1"},
                     r"devices='mesh=data:1' needs launcher=local or launcher=slurm, got 'none'"),
    "many processes": (["seed=1"], {"devices": "distributed=true"},
                       r"--devices: 'distributed' is none of mesh, .* is one process"),
    "no mesh": (["seed=1"], {"devices": "mesh=rows:2"}, r"--devices: mesh='rows:2' is not known"),
    "devices fixed": (["seed=1"], {"fixed": "mesh=data:2"},
                      r"--fixed: 'mesh' is no setting of .*; it is one of --devices"),
    "idle gpus": (["seed=1"], {"launcher": "none", "gpus": "0,1"}, r"gpus=.* needs launcher=local"),
    "idle together": (["seed=1"], {"together": 3}, r"together=3 needs launcher=vmap, got 'local'"),
    "none together": (["seed=1"], {"launcher": "vmap", "together": 0}, r"together=0 is too small"),
    "not ours": (["seed=1"], {"launcher": "vmap"}, r"launcher=vmap is for scripts .* seed=1"),
    "unknown script": (["seed=1"], {"script": "absent"}, r"script='absent' is not known; it may"),
    "no such script": (["seed=1"], {"script": "json"}, r"one of .*state_tracking"),
    "script elsewhere": (["seed=1"], {"script": "../x"}, r"script='../x' is not known; it may"),
    "script of spaces": (["seed=1"], {"script": "a b.c"}, r"script='a b.c' is not known; it may"),
    "very many": (["seed=0:1000000000"], {}, r"0:1000000000 makes 1,000,000,000 runs, and 10,000"),
    "many together": (["seed=0:200;steps=1:200"], {}, r"makes 39,800 runs, and 10,000 are"),
    "more than asked": (["seed=0:3"], {"max_runs": 2}, r"makes 3 runs, and 2 are the most"),
    "no runs": (["seed=0:3"], {"max_runs": 0}, r"max_runs=0 is too small"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_start_nothing(case, tmp_path, capsys):
    grids, others, says = REFUSED[case]
    assert run(tmp_path / "s", *grids, **others) == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_script_of_experiments_is_found_by_its_name():
    assert sweep_grid.load_script("state_tracking").__name__ == "experiments.state_tracking"
    (only,) = sweep_grid.expand("state_tracking", ["num_householder=3"], "group=A5;batch_size=8")
    assert only.config["model"]["vocab_size"] == 67
    with pytest.raises(ConfigError, match="'vocab_size' is no setting of state_tracking"):
        sweep_grid.expand("state_tracking", ["vocab_size=3"], "")


def test_a_sweep_runs_once_and_says_what_came_out(tmp_path, capsys):
    on = "mesh=fsdp:-1;profile_steps=1:2"
    assert run(tmp_path, "seed=0:2;lengths=(4,8),()", workers=2, devices=on) == 0
    out = capsys.readouterr().out
    assert "seed=1,lengths=4-8  done  3/3  4:0.125 8:0.125" in out
    assert "4 runs: 4 done" in out
    assert starts(tmp_path) == dict.fromkeys(names(tmp_path), 1)
    log = (tmp_path / "runs" / names(tmp_path)[0] / "log.txt").read_text()
    assert log.startswith(f"$ -m {SCRIPT} --workdir=")
    assert log.splitlines()[0].endswith(" --mesh=fsdp:-1 --profile_steps=1:2")
    # The same command, or less of it, starts nothing.
    assert run(tmp_path, "seed=0:2;lengths=(4,8),()") == 0
    assert sweep.main([f"--workdir={tmp_path}"]) == 0
    assert set(starts(tmp_path).values()) == {1}
    rows = table(tmp_path)
    row = rows["seed=1,lengths=4-8"]
    assert list(row)[:4] == ["run", "state", "seed", "lengths"]
    assert [row[name] for name in ("state", "seed", "lengths", "rate", "shuffle", "limit")] == [
        "done", "1", "4,8", "0.25", "true", "",
    ]  # fmt: skip
    assert row["results.test.8.strict.sequence_accuracy"] == "0.125"
    assert row["results.parameters.total"] == "7"
    assert float(row["train_seconds"]) == 3 * 8 / 4.0
    assert not any("cumulative" in column for column in row)


def test_tables_come_from_records_alone(tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    assert run(tmp_path, "seed=0:2;failures=0,9", retries=0) == 1
    before = [(tmp_path / name).read_bytes() for name in ("results.csv", "results.parquet")]
    for name in ("results.csv", "results.parquet"):
        (tmp_path / name).unlink()
    assert sweep.main([f"--workdir={tmp_path}", "--launcher=none"]) == 0
    assert "seed=0,failures=9  failed  error: start 1" in capsys.readouterr().out
    after = [(tmp_path / name).read_bytes() for name in ("results.csv", "results.parquet")]
    assert after == before
    rows = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["run"] for row in rows] == names(tmp_path)
    assert [row["seed"] for row in rows] == [0, 0, 1, 1]
    assert [row["lengths"] for row in rows] == [[4]] * 4
    assert [row["results.test.8.strict.sequence_accuracy"] for row in rows] == [
        0.0,
        None,
        0.125,
        None,
    ]
    assert [row["state"] for row in rows] == ["done", "failed"] * 2
    assert {spell: table(tmp_path)[spell]["rate"] for spell in names(tmp_path)} == dict.fromkeys(
        names(tmp_path), "0.25"
    )


def test_what_dies_is_tried_again_and_the_rest_goes_on(tmp_path, capsys):
    grids = ["failures=1,3;seed=0", "killed=1,9;seed=0", "seed=5"]
    assert run(tmp_path, *grids, retries=2) == 1
    assert starts(tmp_path) == {
        "failures=1,seed=0": 2, "failures=3,seed=0": 3, "killed=1,seed=0": 2, "killed=9,seed=0": 3,
        "seed=5": 1,
    }  # fmt: skip
    rows = table(tmp_path)
    assert {name: row["state"] for name, row in rows.items()} == {
        "failures=1,seed=0": "done", "failures=3,seed=0": "failed", "killed=1,seed=0": "done",
        "killed=9,seed=0": "failed", "seed=5": "done",
    }  # fmt: skip
    assert rows["failures=3,seed=0"]["error"] == "error: start 3 of this run fails"
    assert rows["killed=9,seed=0"]["error"] == "killed by SIGKILL"
    assert rows["seed=5"]["error"] == ""
    assert "failed (3 failed)  3/3" in capsys.readouterr().out
    # Asked again, what failed for good has its tries anew.
    assert run(tmp_path, *grids, retries=0) == 0
    assert starts(tmp_path)["failures=3,seed=0"] == 4
    assert table(tmp_path)["failures=3,seed=0"]["state"] == "done"
    assert starts(tmp_path)["seed=5"] == 1


def test_a_sweep_that_breaks_down_stops_its_children(tmp_path, monkeypatch, capsys):
    written = []

    def full_disk(folder, finished=None):
        if written:
            raise RunDirectoryError("results.csv cannot be written: No space left on device")
        written.append(folder)

    monkeypatch.setattr(running, "write_tables", full_disk)
    fixed = "steps=2000"
    assert run(tmp_path, "seed=0:2;step_ms=0,20", fixed=fixed, workers=2) == 2
    assert capsys.readouterr().err.startswith("error: results.csv cannot be written: No space")
    at_work = tmp_path.glob("runs/*/at_work")
    assert {Lock(path).is_held() for path in at_work} == {False}


def test_a_run_that_ends_without_results_has_failed(tmp_path):
    assert run(tmp_path, "seed=0", fixed="steps=1", retries=0) == 0
    results = tmp_path / "runs" / "seed=0" / "results.json"
    results.write_text("{")
    folder = sweep_records.RunFolder(tmp_path, sweep_grid.read_list(tmp_path)[1][0])
    assert folder.state() == "started"
    program = [sys.executable, "-c", "print('quiet')"]
    log = folder.path / "log.txt"
    log.write_text("quiet\n")
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    process.wait()
    attempt = sweep_attempts.Attempt(sweep_attempts.Claims([folder]), process, log)
    assert attempt.poll() == ["ended without results.json, with exit code 0"]
    assert folder.state() == "failed"


def test_what_ended_out_of_sight_took_an_attempt(tmp_path):
    assert run(tmp_path, "seed=0") == 0
    (tmp_path / "runs" / "seed=0" / "attempts.jsonl").unlink()
    assert sweep.main([f"--workdir={tmp_path}", "--launcher=none"]) == 0
    assert table(tmp_path)["seed=0"]["attempts"] == "1"


def test_a_grid_may_grow_and_not_shrink_or_change(tmp_path, capsys):
    assert run(tmp_path, "seed=0:2", fixed="steps=2") == 0
    saved = (tmp_path / "runs.json").read_bytes()
    for grids, fixed in ((["seed=0:1"], "steps=2"), (["seed=0:2"], "steps=3")):
        capsys.readouterr()
        assert run(tmp_path, *grids, fixed=fixed) == 2
        error = capsys.readouterr().err
        assert re.search(
            r"holds another sweep: \d of its 2 runs, such as seed=[01], are not", error
        )
        assert error.count("\n") == 1
    assert (tmp_path / "runs.json").read_bytes() == saved
    assert run(tmp_path, "seed=0:3;steps=2,4") == 0
    # Runs are told apart by what they resolve to: the two that were there keep their folders.
    assert names(tmp_path) == [
        "seed=0", "seed=1", "seed=0,steps=4", "seed=1,steps=4", "seed=2,steps=2", "seed=2,steps=4",
    ]  # fmt: skip
    assert set(starts(tmp_path).values()) == {1}
    capsys.readouterr()
    assert run(tmp_path, "num_householder=2", script="state_tracking") == 2
    assert "holds a sweep of tests.stand_in, not of state_tracking" in capsys.readouterr().err


SAVED = {"name": "seed=0", "settings": {"seed": "0"}, "keys": ["seed"], "config": {"train": {}}}
LISTS = [
    ("{", "runs.json is not valid JSON"),
    ("[]", r"runs.json: \[\] must be an object"),
    ('{"script": "tests.stand_in", "runs": [{"name": "a"}]}', r"runs\[0\].\w+ is missing"),
    ('{"script": 3, "runs": []}', "script=3 must be a text"),
    (SAVED | {"name": "../../evil"}, r"runs\[0\].name='../../evil' is no name of a run's folder"),
    (SAVED | {"name": ".."}, r"runs\[0\].name='..' is no name"),
    (SAVED | {"name": "a\0"}, r"runs\[0\].name='a.x00' is no name"),
    (SAVED | {"settings": {"seed": 0}}, r"runs\[0\].settings.seed=0 must be a text"),
    (SAVED | {"settings": {}}, r"runs\[0\].keys has 'seed', which is not in its settings"),
    (SAVED | {"config": {"train": 7}}, r"runs\[0\].config.train=7 must be an object"),
]


@pytest.mark.parametrize(("content", "says"), LISTS)
def test_a_damaged_list_is_one_line(content, says, tmp_path, capsys):
    if isinstance(content, dict):
        content = json.dumps({"script": SCRIPT, "runs": [content]})
    (tmp_path / "runs.json").write_text(content)
    assert run(tmp_path, "seed=0") == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["runs.json"]


DAMAGED = [
    ("results.json", b"{}", r"results\.json: \w+ is missing"),
    ("results.json", b'{"steps": 3, "best_step": 3, "parameters": {}, "test": 7}', "test=7 must"),
    ("metrics.jsonl", b'{"step": "three"}\n', r"metrics\.jsonl, line 1: step='three' must be"),
    ("metrics.jsonl", b'{"tokens": 8, "tokens_per_second": 0}\n', "line 1: tokens_per_second must"),
    ("attempts.jsonl", b'{"time": 1, "exit_code": 2, "seconds": 1}\n', "line 1: error is missing"),
    ("attempts.jsonl", b"[" * 100_000 + b"\n", r"attempts\.jsonl, line 1 is nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), DAMAGED)
def test_a_damaged_record_is_named_in_the_tables_and_the_rest_goes_on(
    name, content, says, tmp_path, capsys
):
    assert run(tmp_path, "seed=0:2") == 0
    (tmp_path / "runs" / "seed=0" / name).write_bytes(content)
    capsys.readouterr()
    assert sweep.main([f"--workdir={tmp_path}", "--launcher=none"]) == 0
    assert re.search(f"seed=0  damaged  .*{says}", capsys.readouterr().out)
    assert table(tmp_path)["seed=0"]["state"] == "damaged"
    assert re.search(says, table(tmp_path)["seed=0"]["error"])
    assert table(tmp_path)["seed=1"]["state"] == "done"
    if name == "attempts.jsonl":  # the sweep's own, which it would add to
        assert run(tmp_path) == 2
        assert re.search(says, capsys.readouterr().err)


def test_a_file_in_the_place_of_a_run_fails_that_run_alone(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "seed=0").write_text("mine")
    assert run(tmp_path, "seed=0:2", retries=0) == 1
    assert re.search(r"seed=0 +failed .*cannot be locked", capsys.readouterr().out)
    rows = table(tmp_path)
    assert {name: row["state"] for name, row in rows.items()} == {
        "seed=0": "damaged",
        "seed=1": "done",
    }
    assert rows["seed=0"]["error"].endswith("runs/seed=0 is no directory")
    assert (tmp_path / "runs" / "seed=0").read_text() == "mine"


def test_results_without_content_are_not_done(tmp_path):
    assert run(tmp_path, "seed=0") == 0
    (tmp_path / "runs" / "seed=0" / "results.json").write_text("{}")
    assert run(tmp_path, "seed=0") == 0
    assert starts(tmp_path) == {"seed=0": 2}
    assert table(tmp_path)["seed=0"]["state"] == "done"


def test_attempts_are_never_torn(tmp_path):
    (only,) = sweep_grid.expand(SCRIPT, ["seed=0"], "")
    folder = sweep_records.RunFolder(tmp_path, only)
    folder.add_attempt(2, 1.5, "first")
    with open(folder.path / "attempts.jsonl", "ab") as file:
        file.write(b'{"time": 3')
    folder.add_attempt(2, 2.5, "second")
    assert [attempt["error"] for attempt in folder.attempts()] == ["first", "second"]
    assert folder.seconds() == 4.0


@needs_submitit
@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("cluster=cloud", "slurm='cluster=cloud' is refused by submitit: .*cloud"),
        ("cluster=local;cluster_size=3", "is refused by submitit: "),
        ("cluster=local;nodes=2", "slurm='cluster=local;nodes=2': nodes may be 1, since a run"),
        ("slurm_partition=gpu", "is refused by submitit: .*srun"),
    ],
)
def test_bad_parameters_of_jobs_are_one_line(parameters, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # where no SLURM is
    assert run(tmp_path, "seed=0", launcher="slurm", slurm=parameters) == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())  # another grid may be given in its place


def test_without_submitit_the_error_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run(tmp_path, "seed=0", launcher="slurm") == 2
    assert "needs the package submitit; pip install" in capsys.readouterr().err


def test_without_pyarrow_the_csv_is_written_alone(tmp_path, capsys, monkeypatch):
    for module in (running, sweep_records):
        monkeypatch.setattr(module, "has_parquet", lambda: False)
    assert run(tmp_path, "seed=0") == 0
    assert "results.parquet needs the package pyarrow" in capsys.readouterr().out
    assert (tmp_path / "results.csv").exists()
    assert not (tmp_path / "results.parquet").exists()


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(sweep_attempts, "cores", lambda: 8)
    for name in ("NPROC", "OMP_NUM_THREADS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.delenv(name, raising=False)
    shared = sweep_attempts.environment(workers=3, gpus=["1", "3"])
    assert (shared["NPROC"], shared["OMP_NUM_THREADS"]) == ("2", "2")
    assert shared["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert shared["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert "NPROC" not in sweep_attempts.environment(workers=1)
    monkeypatch.setenv("NPROC", "5")
    assert sweep_attempts.environment(workers=3)["NPROC"] == "5"


def test_more_workers_than_runs_are_none_too_many():
    scheduler = Scheduler([], lambda runs, slot: None, 10**15, retries=0, changed=print)
    assert not scheduler.step()


def test_jobs_without_slurm_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    assert "cluster=local" in capsys.readouterr().out
