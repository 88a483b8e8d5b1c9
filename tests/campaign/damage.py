"""What campaigns share: how many cases, how a command may end, and damage to files at random."""

import contextlib
import faulthandler
import io
import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tiny_run import snapshot

HANG_S = 240


def cases(number):
    return settings(
        max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def outcome(main, argv):
    """Exit code and lines on standard error; any exception is the test's to fail with."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    with (
        contextlib.redirect_stderr(io.StringIO()) as err,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            code = main(argv)
        except SystemExit as done:  # --help, and sweeps with runs that failed
            code = done.code
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("step ")]
    return code, lines


def check(code, lines):
    assert code in (0, 1, 2)
    if code == 2:
        assert lines[-1].startswith("error: ")
        assert sum(line.startswith("error: ") for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


def files_in(directory):
    return snapshot(directory) if directory.exists() else None


# What stands where a flag wants a number, a name or a path.
NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "0",
    "1.5",
    "True",
    "none",
    "",
    "10" * 40,
    "1_0",
    "४",
]
NUMBERS += ["1e-400", "0x10", "2147483648", "9" * 5000, "1,2", ",", "1,,2", "8", "3"]
TEXTS = [
    "../x",
    "~",
    "~nobody/x",
    "a\0b",
    "\udcff",
    "x" * 5000,
    "/",
    ".",
    "S\uff13",
    "S4_x_",
    "{}",
    "S3",
]


class AcceptedError(Exception):
    """What a run that would have begun raises instead."""


JUNK = [
    3,
    True,
    None,
    -1,
    1.5,
    "x",
    [],
    {},
    [[]],
    {"a": {}},
    10**30,
    "../../evil",
    ["a"],
    [1, None],
]
UNREADABLE = (ValueError, RecursionError)
RAW = [b"", b"{", b"\xff\xfe", b"NaN", b"Infinity", b"1e999", b"[" * 20_000, b'"\\ud800"', b"null"]


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 3)):
            yield from places(value[index], (*path, index))


def changed(value, path, new):
    """The value with what is at a path replaced, or left out where ``new`` is `AcceptedError`."""
    if not path:
        return new
    value = value.copy()
    if len(path) == 1 and new is AcceptedError:
        del value[path[0]]
    else:
        value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


def damage_json(data, text):
    value = json.loads(text)
    path = data.draw(st.sampled_from(list(places(value))))
    new = data.draw(st.sampled_from([*JUNK, AcceptedError] if path else JUNK))
    return json.dumps(changed(value, path, new)).encode()


def damage(data, path):
    """Does something to one file."""
    kind = data.draw(st.sampled_from(["json", "json", "raw", "flip", "cut", "gone", "folder"]))
    content = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, max(len(content) - 1, 0)))])
    elif kind == "flip" and content:
        place = data.draw(st.integers(0, len(content) - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
    elif kind == "json" and path.suffix == ".json":
        with contextlib.suppress(*UNREADABLE):  # damaged before
            path.write_bytes(damage_json(data, content))
    elif kind == "json" and path.suffix == ".jsonl" and content:
        lines = content.splitlines()
        index = data.draw(st.integers(0, len(lines) - 1))
        with contextlib.suppress(*UNREADABLE):
            lines[index] = damage_json(data, lines[index])
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.write_bytes(data.draw(st.sampled_from(RAW)))


def files(directory, pattern="*"):
    return sorted(p for p in directory.rglob(pattern) if p.is_file() and "commit" not in p.name)
