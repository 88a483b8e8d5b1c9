"""Files and paths as users write them: what is read or refused, and what takes whose place."""

import json
import os
import stat
from pathlib import Path

import pytest

from deltaproduct_jax import files, strict_json
from deltaproduct_jax.data import shards
from deltaproduct_jax.errors import ConfigError, RunDirectoryError


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not valid JSON"),
        (b"NaN", "is not valid JSON: NaN is no number of JSON"),
        (b"[1, -Infinity]", "is not valid JSON: -Infinity is no number of JSON"),
        (b"1e999", "is not valid JSON: 1e999 is larger than any float"),
        (b"1" * 5000, "is not valid JSON"),
        (b'{"a": 1, "b": {"a": 1, "a": 2}}', "is not valid JSON: 'a' is there more than once"),
        (b"[" * 33 + b"]" * 33, "is nested too deeply; 32 levels are the most"),
        (b"[" * 10**6, "is nested too deeply"),
        (rb'["\ud800"]', "has a character that is half of one"),
        (rb'{"\uDFFF": 1}', "has a character that is half of one"),
        (b"\xff", "is not valid JSON"),
    ],
)
def test_what_is_no_json_of_ours(content, says, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path} {says}")


@pytest.mark.parametrize("content", [
    b"[" * 32 + b"]" * 32, rb'["\ud83d\ude00"]', rb'["\\ud800"]', b'[{"a": 1}, {"a": 1}]', b"1e308",
    b"[" + b"[]," * 99 + b"[]]",
])  # fmt: skip
def test_what_only_looks_odd_is_read(content):
    assert strict_json.decode(content, list | float, "here") == json.loads(content)


def test_lines_are_read_up_to_the_last_break(tmp_path):
    path = tmp_path / "a.jsonl"
    assert files.read_lines(path) == []
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert files.read_lines(path, dict[str, int]) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n\n')
    with pytest.raises(RunDirectoryError, match=r"a\.jsonl, line 2 is not valid JSON"):
        files.read_lines(path)
    path.write_bytes(b'{"a": 1}\n{"a": "2"}\n')
    with pytest.raises(RunDirectoryError, match=r"a\.jsonl, line 2: a='2' must be a whole number"):
        files.read_lines(path, dict[str, int])


def test_what_is_put_aside_takes_the_first_free_name(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / "metrics.jsonl").write_text(str(number))
        aside = files.set_aside(tmp_path / "metrics.jsonl")
        assert aside == tmp_path / f"metrics.aside{number}.jsonl"
        assert aside.read_text() == str(number)
        assert not (tmp_path / "metrics.jsonl").exists()
    (tmp_path / "checkpoints").mkdir()
    assert files.set_aside(tmp_path / "checkpoints").name == "checkpoints.aside1"
    with pytest.raises(RunDirectoryError, match="absent cannot be renamed: No such file"):
        files.set_aside(tmp_path / "absent")


def test_a_file_is_whole_and_lines_are_added(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    files.write_file(path, b"first")
    files.write_file(path, b"second")
    files.write_file(path, b" more", append=True)
    assert path.read_bytes() == b"second more"
    assert [found.name for found in path.parent.iterdir()] == ["a.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"a\.txt cannot be written: (Not a|File exists)"):
        files.write_file(tmp_path / "file" / "a.txt", b"")


@pytest.fixture
def reached(monkeypatch):
    """What reaches the disk, in order: a file by its size, the list of a folder; and renames."""
    seen, sync, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        found = os.fstat(descriptor)
        seen.append("folder" if stat.S_ISDIR(found.st_mode) else found.st_size)
        sync(descriptor)

    def replaced(*paths):
        seen.append("renamed")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replaced)
    return seen


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, reached):
    """Or a machine that dies would leave a name without its content, or a removed file."""
    for write in (
        lambda path: files.write_file(path, b"12345"),
        lambda path: shards.write_whole(path, lambda file: file.write(b"12345")),
    ):
        write(tmp_path / "a")
        assert reached == [5, "renamed", "folder"]
        reached.clear()
    files.set_aside(tmp_path / "a")
    assert reached == ["folder"]
    reached.clear()
    files.require_writable(tmp_path, "workdir")  # a disk may tell only then that it is full
    assert reached == [files.PROBE_BYTES]


def test_an_added_line_waits_for_no_disk(tmp_path, reached):
    files.write_file(tmp_path / "a", b"line\n", append=True)
    assert (tmp_path / "a").read_bytes() == b"line\n"
    assert reached == []


def test_another_process_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files.jax, "process_index", lambda: 1)
    files.write_file(tmp_path / "a", b"")
    assert files.set_aside(tmp_path / "b") == tmp_path / "b.aside1"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "run='' is empty; it may be a path on a disk"),
        ("a\0b", r"run='a\\x00b' has a NUL character; it may be"),
        ("x" * 300, "run='x+' cannot be reached: File name too long; it may be another path"),
        ("s3://bucket/run", "run='s3://bucket/run' is an address; it may be a path on a disk"),
        ("~nobody_of_this_name/run", "run='~nobody_of_this_name/run' begins with a home that is"),
    ],
)
def test_paths_that_are_none(text, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        files.user_path(text, "run")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("a\0b", r"workdir='a\\x00b' cannot be a directory: it has a NUL character"),
        ("gs:/bucket/run", "workdir=gs://bucket/run is in a bucket, which has no locks"),
        ("x" * 300, "workdir=x+ cannot be a directory: File name too long"),
    ],
)
def test_directories_that_cannot_be(path, says):
    with pytest.raises(RunDirectoryError, match=f"^{says}"):
        files.require_directory(Path(path), "workdir")


def test_a_directory_may_become_one_where_no_file_is(tmp_path):
    files.require_directory(tmp_path / "new" / "er", "workdir")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"^workdir=.*file cannot be a directory: Not"):
        files.require_directory(tmp_path / "file", "workdir")


def test_a_path_is_said_behind_the_outermost_setting_that_gave_it(tmp_path):
    path = tmp_path / "absent"
    with files.given_by("run", path), files.given_by("directory", path):
        assert files.named(path) == f"run={path}"
        assert files.named(path / "a") == str(path / "a")
        with pytest.raises(RunDirectoryError, match=f"^run={path} cannot be read: No such"):
            files.read_json(path)
    with pytest.raises(RunDirectoryError, match=f"^{path} cannot be read: No such"):
        files.read_json(path)


def test_only_errors_of_the_disk_become_one_line():
    with (
        pytest.raises(RunDirectoryError, match=r"^a cannot be read: No such file or directory$"),
        files.errors_as_one_line(Path("a"), "read"),
    ):
        raise FileNotFoundError("storage.googleapis.com said no")
    with pytest.raises(KeyError), files.errors_as_one_line(Path("a"), "read"):
        raise KeyError("a bug")
    bucket = files.epath.Path("gs://bucket/a")
    with (
        pytest.raises(RunDirectoryError, match=r"^gs://bucket/a cannot be read: .*token expired"),
        files.errors_as_one_line(bucket, "read"),
    ):
        raise KeyError("token expired")
