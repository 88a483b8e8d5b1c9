"""Legs: settings, children that fail or are told to end, records made again, side by side."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.training.locks import Lock, held
from experiments.language import legs, pack_text
from experiments.language import paper as one_leg
from experiments.lib import children, flags
from experiments.lib.children import Child
from experiments.lib.legs.config import LegConfig
from experiments.lib.legs.jobs import Parts, Place, missing, paper, progress_of
from experiments.lib.legs.leg import (
    EXTRAPOLATION,
    RANKS,
    SAMPLES,
    TRAINING,
    Leg,
    Part,
)
from experiments.lib.legs.schedule import Progress


def test_settings_of_legs():
    config = legs.LegsConfig(legs=("213m_3:0", "tiny:7"))
    assert config.named == [("213m_3", 0), ("tiny", 7)]
    for wrong, said in (
        ({"legs": ()}, "legs is empty"),
        ({"legs": ("213m_4:0",)}, "legs='213m_4' is not known"),
        ({"legs": ("213m_3",)}, "legs='213m_3' must be LEG:SEED"),
        ({"legs": ("213m_3:-1",)}, "legs='213m_3:-1' must be LEG:SEED"),
        ({"legs": ("tiny:0", "tiny:00")}, "legs='tiny:0,tiny:00' has a leg twice"),
        ({"deadline_s": 0.0}, "deadline_s=0.0 must be greater than 0"),
        ({"overlap_s": -1.0}, "overlap_s=-1.0 is too small"),
        ({"memory_fraction": 1.5}, "memory_fraction=1.5 is too large; it may be up to 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            dataclasses.replace(config, **wrong)
    for name, parts in (("213m_2_gated", 4), ("36m_2", 1), ("tiny", 1)):
        assert LegConfig(leg=name).parts == parts
    assert LegConfig(leg="213m_1", batch_size=6).parts == 2
    assert LegConfig(leg="213m_1", accumulation_steps=8).parts == 8


def test_commands_and_surroundings_of_legs(tmp_path, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    config = LegConfig(archive="text.tar.xz", stages=("train",))
    command = paper(tmp_path, "train", config.flags(leg="36m_1", seed=3))
    parsed = flags.parse(command[3:], {"paper": LegConfig}, {"default": {}})
    expected = dataclasses.replace(config, leg="36m_1", seed=3)
    assert LegConfig(**parsed.sections["paper"]) == expected
    place = Place(tmp_path, ["4", "7"], tmp_path / "programs", 0.25)
    variables = place.variables(1, 0.25)
    assert variables["CUDA_VISIBLE_DEVICES"] == "7"
    assert variables["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.25"
    assert place.variables(0)["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    large, small = Leg("213m_2", 0, tmp_path), Leg("36m_2", 0, tmp_path)
    assert place.share(large, config) == 0.25
    place = dataclasses.replace(place, memory_fraction=None)
    shares = [place.share(each, config) for each in (large, small)]
    assert shares == pytest.approx([0.31, 0.27])  # measured: 35.6 and 33.0 of 139.8 GiB
    assert place.share(large, dataclasses.replace(config, accumulation_steps=1)) == 1
    # Models without factors have no states to take ranks of.
    for name, number in (("36m_2_hybrid", 3), ("36m_transformer", 2), ("36m_mamba2", 2)):
        assert len(missing(Leg(name, 0, tmp_path), config)) == number
    assert progress_of(Leg("tiny", 0, tmp_path)) == Progress()


def test_processes_of_a_leg_say_what_failed_and_where(tmp_path):
    of, place = Leg("tiny", 0, tmp_path), Place(tmp_path, [], tmp_path / "programs", 0.3)
    python = lambda code: [sys.executable, "-c", code]
    (tmp_path / "logs").mkdir()
    place.log("tiny_seed0.bad").write_text("of an earlier start\n")
    written = of.records / SAMPLES
    parts = [
        Part("bad", python("import sys; print('error: no'); sys.exit(3)"), tmp_path / "x"),
        Part("good", python("print('text')"), written, output=written),
        Part("torn", python("print(1); raise SystemExit(1)"), tmp_path / "y", tmp_path / "y"),
    ]
    job = Parts(of, place, 0, parts, None)
    while (failed := job.poll()) is None:
        time.sleep(0.01)
    logs = tmp_path / "logs"
    assert failed == [
        f"tiny_seed0: bad failed with exit code 3, see {logs}/tiny_seed0.bad.log: error: no",
        f"tiny_seed0: torn failed with exit code 1, see {logs}/tiny_seed0.torn.log",
    ]
    assert written.read_text() == "text\n"
    assert not list(tmp_path.glob("*y*"))  # what was torn
    sleeping = Child(python("import time; time.sleep(60)"))
    sleeping.stop()
    assert sleeping.poll() == -signal.SIGTERM
    assert not sleeping.has_failed()


def test_records_that_are_damaged_or_of_other_settings_are_made_again(tmp_path):
    of = Leg("tiny", 0, tmp_path)
    config = LegConfig(leg="tiny", length=512, rows=2, rank_length=256)
    for name, text in (
        (SAMPLES, ""),
        (EXTRAPOLATION, '{"config": {"length": 512, "rows": 2}, "curves": []}'),
        (RANKS, '{"config": {"length": 256}}'),
    ):
        (of.records / name).parent.mkdir(parents=True, exist_ok=True)
        (of.records / name).write_text(text)
    named = lambda **fields: [
        part.name for part in missing(of, dataclasses.replace(config, **fields))
    ]
    assert named() == []
    assert named(length=256) == named(rows=4) == ["extrapolation"]
    assert named(rank_length=128) == ["effective_rank"]
    for text in ('{"config": {"length": 256', '{"curves": []}', "[]"):
        (of.records / RANKS).write_text(text)
        assert named() == ["effective_rank"]


def test_a_workdir_in_use_and_files_in_the_way_are_one_line(tmp_path):
    argv = [f"--workdir={tmp_path}", "--preset=tiny"]
    with (
        held(Lock(tmp_path / legs.LOCK)),
        pytest.raises(RunDirectoryError, match=f"{tmp_path} is in use by process {os.getpid()}"),
    ):
        legs.command(argv)
    (tmp_path / "logs").write_text("")
    with pytest.raises(RunDirectoryError, match=r"prepare\.log cannot be written: File exists"):
        legs.command(argv)
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}


HOLDS = f"import os; os.fstat(int(os.environ['{children.LOCK_VARIABLE}']))"


def test_one_leg_alone_is_refused_beside_all_unless_those_began_it(tmp_path, capsys, monkeypatch):
    argv = [f"--workdir={tmp_path}", "--preset=tiny"]
    lock = Lock(tmp_path / legs.LOCK)
    with held(lock):
        for stages in ("measure", "train", "prepare,draw"):
            with pytest.raises(RunDirectoryError, match="is in use by process"):
                one_leg.command([*argv, f"--stages={stages}"])
        with pytest.raises(ConfigError, match="has no records"):  # which is all that is amiss
            one_leg.command([*argv, "--stages=draw"])
        children.run([sys.executable, "-S", "-c", HOLDS], lock=lock)
        for number, says in ((lock.descriptor, "is not finished"), (2, None), (9999, None)):
            monkeypatch.setenv(children.LOCK_VARIABLE, str(number))
            with contextlib.nullcontext() if says else pytest.raises(RunDirectoryError):
                one_leg.command([*argv, "--stages=measure"])
            assert (says or "") in capsys.readouterr().err
    one_leg.command([*argv, "--stages=measure"])
    assert "tiny_seed0 is not finished" in capsys.readouterr().err


def test_all_legs_are_refused_beside_one_whose_own_processes_hold_the_lock(
    tmp_path, capsys, monkeypatch
):
    """Other legs alone are not, and a folder of figures that are drawn is free."""
    argv = [f"--workdir={tmp_path}", "--preset=tiny"]
    refused = f"^{tmp_path} is in use by process {os.getpid()} on .*; wait for its end, or give"

    def look(command, **options):
        child = Child([sys.executable, "-c", "import time; time.sleep(60)"], lock=options["lock"])
        try:
            one_leg.command([*argv, "--seed=1", "--stages=measure"])
            with pytest.raises(RunDirectoryError, match=refused):
                legs.command(argv)
        finally:
            child.kill()
        raise ConfigError("looked")

    monkeypatch.setattr(one_leg, "run", look)
    (tmp_path / "text").mkdir()
    for stages in ("train", "prepare"):
        with pytest.raises(ConfigError, match="looked"):
            one_leg.command([*argv, f"--stages={stages}"])
    assert capsys.readouterr().err.count("tiny_seed1 is not finished") == 2
    assert not (tmp_path / legs.LOCK).exists()
    monkeypatch.setattr(one_leg, "records_of", lambda _: legs.command(argv))
    (tmp_path / "logs").write_text("")
    with pytest.raises(RunDirectoryError, match=r"prepare\.log cannot be written"):
        one_leg.command([*argv, "--stages=draw"])


def test_what_was_begun_holds_the_lock_and_says_why_it_failed(tmp_path):
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    with held(Lock(tmp_path / "lock")) as lock:
        child = Child(sleeping, lock=lock)
        os.close(lock.descriptor)  # as of a process that is gone
        lock.descriptor = None
        assert Lock(tmp_path / "lock").is_held()
        child.kill()
        assert not Lock(tmp_path / "lock").is_held()
    failing = [sys.executable, "-c", "print('much'); raise SystemExit('error: no archive')"]
    with pytest.raises(ConfigError, match=r"failed with 1, see .*part\.log: error: no archive$"):
        children.run(failing, log=tmp_path / "logs" / "part.log")


def test_what_goes_on_beside_a_part_is_waited_for(capfd):
    asked = []
    code = "print('part')"  # over before the tenth time
    children.run([sys.executable, "-c", code], beside=lambda: asked.append(0) or len(asked) < 10)
    assert len(asked) >= 10
    child = Child([sys.executable, "-c", "import time; time.sleep(60)"])
    child.kill()
    assert child.poll() == -signal.SIGKILL
    assert "part" in capfd.readouterr().out


@pytest.mark.slow
def test_legs_side_by_side_go_on_and_tell_of_one_that_fails(tmp_path, capfd, monkeypatch):
    for folder in ("fs/xfs", "fs/btrfs", "drivers", "Documentation"):
        for number in range(8):
            ending = "rst" if folder == "Documentation" else "c"
            file = tmp_path / "kernel" / folder / f"{number}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = (f"int f{number}_{i}(void) {{ return {i}; }}\n" for i in range(200))
            file.write_text("".join(lines))
    text, folder = tmp_path / "text", tmp_path / "legs"
    pack_text.command([f"--workdir={text}", f"--source={tmp_path}/kernel"])
    argv = [f"--workdir={folder}", f"--archive={text}/text.tar.xz", "--preset=tiny"]
    argv += ["--tokens=400000", "--legs=tiny:0,tiny:1,tiny:2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as if there were two
    command = [sys.executable, "-m", "experiments.language.legs", *argv]
    of = [Leg("tiny", seed, folder) for seed in range(3)]
    of[1].run.mkdir(parents=True)
    (of[1].run / "config.json").write_text("{")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 300
        while not progress_of(of[0]).tokens and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        said = process.communicate()[1].splitlines()
    assert process.returncode == 143
    assert said[-1] == f"stopped by SIGTERM; the same command goes on in {folder}"
    assert f"GPU 1: {of[1].label} begins" in said
    first = json.loads((of[0].records / TRAINING).read_text())
    assert first["curve"]
    assert first["results"] is None
    assert any((of[0].run / "checkpoints").iterdir())
    with pytest.raises(SystemExit, match="1"):
        legs.command(argv)
    shown = capfd.readouterr()
    log = folder / "logs" / "tiny_seed1.train.log"
    why = f"error: {of[1].run / 'config.json'} is not valid JSON"
    assert f"tiny_seed1: train failed with exit code 2, see {log}: {why}" in shown.err
    assert "tiny_seed1 is not finished; the same command goes on" in shown.err
    for done in (of[0], of[2]):
        record = json.loads((done.records / TRAINING).read_text())
        assert record["results"]["steps"] == 390
        ranks = json.loads((done.records / RANKS).read_text())
        assert len(ranks["along"]["mean"]) == len(ranks["along"]["position"]) == 16
        assert (done.records / SAMPLES).stat().st_size > 0
        assert len(list(done.records.iterdir())) == 4  # spares are gone
        assert f"| tiny | {done.seed} | 399,360 |" in shown.out
    # A made-up text, in a folder that is gone, had the first legs' program compiled.
    assert "step 1/390" in (folder / "logs" / "warming.log").read_text()
    assert not (folder / "warming").exists()
    assert len(list((folder / "programs").glob("jit_train_step-*-cache"))) == 1
    assert (folder / "ranks.png").stat().st_size > 10_000
    record = json.loads((of[0].records / TRAINING).read_text())
    assert len(record["starts"]["starts"]) == 2  # it went on where it stood
    # As of a start that ended before it kept what it had trained, and a record that was damaged.
    (of[0].records / TRAINING).unlink()
    (of[2].records / EXTRAPOLATION).write_text("{")
    argv[-1] = "--legs=tiny:0,tiny:2"
    legs.command(argv)
    assert json.loads((of[0].records / TRAINING).read_text()) == record
    assert json.loads((of[2].records / EXTRAPOLATION).read_text())["curves"]
    with pytest.raises(
        RunDirectoryError, match=r"tiny_seed0 holds .* differing in steps \(390 the"
    ):
        legs.command([*argv, "--tokens=800000"])
