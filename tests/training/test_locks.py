"""Locks of run directories: one holder at a time, and none once its process has ended."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from tiny_run import run_config, snapshot

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.training import locks, loop
from deltaproduct_jax.training.locks import RUN_LOCK, Lock, run_lock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from deltaproduct_jax.training.locks import Lock
lock = Lock(Path(sys.argv[1]))
assert lock.acquire()
print("held", flush=True)
input()
"""


@pytest.fixture
def held(tmp_path):
    """A process that holds the lock of ``tmp_path`` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / RUN_LOCK)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_one_holder_at_a_time(tmp_path):
    first, second = Lock(tmp_path / "new" / "lock"), Lock(tmp_path / "new" / "lock")
    assert not first.is_held()
    assert first.acquire()
    assert second.is_held()
    assert not second.acquire()
    second.release()  # of no effect
    assert second.is_held()
    assert second.owner().startswith(f"process {os.getpid()} on ")
    for content, owner in ((b"", "another process"), (b"\xff", "\ufffd")):  # damaged meanwhile
        (tmp_path / "new" / "lock").write_bytes(content)
        assert second.owner() == owner
    first.release()
    assert not (tmp_path / "new" / "lock").exists()
    assert second.acquire()
    second.release()


def test_a_lock_is_shared_by_those_who_agree(tmp_path):
    path = tmp_path / "lock"
    alone, first, second = Lock(path), Lock(path, shared=True), Lock(path, shared=True)
    path.write_text("process 1 on nowhere")  # of a process that was killed
    assert first.acquire()
    assert not alone.acquire()
    assert first.owner() == f"process {os.getpid()} on {os.uname().nodename}"
    assert second.acquire()
    assert first.owner().count(" and process ") == 1
    first.release()
    assert path.exists()
    assert not alone.acquire()
    second.release()
    assert not path.exists()
    assert alone.acquire()
    assert not first.acquire()
    alone.release()


def test_a_run_in_use_is_refused_until_its_process_is_killed(held, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
    before = snapshot(tmp_path)
    with pytest.raises(RunDirectoryError, match="in use by process") as error:
        loop.train(run_config(), tmp_path, ["test"])
    assert re.search(rf"process {held.pid} on .*; wait for its end, or give", str(error.value))
    assert snapshot(tmp_path) == before
    held.send_signal(signal.SIGKILL)
    held.wait()
    assert (tmp_path / RUN_LOCK).exists()  # which means nothing now
    assert not Lock(tmp_path / RUN_LOCK).is_held()
    results = loop.train(run_config(), tmp_path, ["test"])
    assert not (tmp_path / RUN_LOCK).exists()
    with run_lock(tmp_path):  # a finished run is only read
        assert loop.train(run_config(), tmp_path, ["test"]) == results


def test_a_run_that_another_process_ended_meanwhile_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
    loop.train(run_config(), tmp_path / "other", ["test"])
    real = loop.run_lock

    def late(directory):
        (tmp_path / "other").rename(directory)
        return real(directory)

    monkeypatch.setattr(loop, "run_lock", late)
    before = snapshot(tmp_path / "other")
    loop.train(run_config(), tmp_path / "run", ["test"])
    assert snapshot(tmp_path / "run") == before


def test_a_child_that_inherits_the_lock_keeps_it(tmp_path):
    lock = Lock(tmp_path / "lock")
    assert lock.acquire()
    child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.descriptor])
    os.close(lock.descriptor)  # as the kernel does when a process ends
    assert Lock(tmp_path / "lock").is_held()
    child.kill()
    child.wait()
    assert not Lock(tmp_path / "lock").is_held()


def test_a_lock_on_a_removed_file_is_not_taken(tmp_path, monkeypatch):
    # Between opening the file and locking it, its holder ends and removes it.
    path, opened = tmp_path / "lock", []

    def flock(descriptor):
        if not opened:
            path.unlink()
        opened.append(descriptor)
        return True

    monkeypatch.setattr(locks, "_flock", flock)
    lock = Lock(path)
    assert lock.acquire()
    assert len(opened) == 2
    assert os.path.samestat(os.stat(path), os.fstat(lock.descriptor))
    lock.release()


def test_a_place_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunDirectoryError, match=r"file/run/\.lock cannot be locked: Not a dir"),
        run_lock(tmp_path / "file" / "run"),
    ):
        pass
