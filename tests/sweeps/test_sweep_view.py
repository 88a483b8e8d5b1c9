"""The table of a sweep: its states, times and columns, and what Ctrl-C leaves of it."""

import io
import json
import re
import time

import pytest
from sweeps.helpers import SCRIPT

from experiments.lib.sweeps import grid, records, view


class Terminal(io.StringIO):
    """Keeps what was written; ``screen`` is what a terminal would show of it."""

    def isatty(self):
        return True

    def screen(self):
        lines, row, column = [""], 0, 0
        for code, number, end, text in re.findall(
            r"\x1b\[((\d*)([AKJ]))|([^\x1b])", self.getvalue()
        ):
            if end == "A":
                row -= int(number)
            elif end == "K":
                lines[row] = ""
            elif end == "J":
                lines[row] = lines[row][:column]
                del lines[row + 1 :]
            elif text == "\r":
                column = 0
            elif text == "\n":
                row, column = row + 1, 0
                lines += [""] * (row == len(lines))
            else:
                assert not code
                lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
                column += 1
        return lines


def entries_of(folder, *grids):
    runs = grid.expand(SCRIPT, grids, "")
    return [view.Entry(records.RunFolder(folder, run)) for run in runs]


def record(entry, *rows):
    entry.folder.path.mkdir(parents=True, exist_ok=True)
    with open(entry.folder.path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("LINES", "6")
    monkeypatch.setenv("COLUMNS", "40")


def test_the_table_redraws_itself_on_a_terminal(tmp_path, narrow):
    entries = entries_of(tmp_path, "seed=0:9")
    entries[7].begin(time.time() - 65)
    record(entries[7], {"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.25})
    with open(tmp_path / "runs" / "seed=7" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    shown = view.View(entries, stream=(stream := Terminal()))
    shown.update()
    first = stream.getvalue()
    shown.update()
    assert stream.getvalue() == first  # not more than once a second
    shown.close()
    lines = stream.screen()
    assert re.match(r"seed=7  running  2/3   loss 1.250  1:05$", lines[1])
    assert lines[-2] == "9 runs: 1 running, 8 waiting; 6 not sho"
    assert lines[-1] == ""
    assert all(len(line) < 40 for line in lines)
    assert stream.getvalue().count("\x1b[5A") == 1


def test_ctrl_c_leaves_whole_lines(tmp_path, narrow):
    entries = entries_of(tmp_path, "seed=0:2")
    shown = view.View(entries, stream=(stream := Terminal()))
    shown.update()
    stream.write("^C")  # by the terminal itself
    shown.say("stopping; runs finish their step")
    assert stream.screen()[-2:] == ["stopping; runs finish their step", ""]
    stream.write("^C")
    shown.close()
    stream.write("results: here\n")
    assert stream.screen() == [
        "run     state    step", "seed=0  waiting  0/3", "seed=1  waiting  0/3",
        "2 runs: 2 waiting", "results: here", "",
    ]  # fmt: skip


def test_who_has_no_step_yet_compiles_and_before_that_waits_in_a_queue(tmp_path):
    (entry,) = entries_of(tmp_path, "seed=0")
    record(entry, {"step": 1, "loss": 2.0, "time": time.time() - 60})  # of an earlier attempt
    entry.begin(time.time())
    assert entry.cells()["state"] == "queued"
    (entry.folder.path / "log.txt").write_text("$ command\n")
    assert entry.cells()["state"] == "compiling"
    assert entry.cells()["step"] == "1/3"
    record(entry, {"step": 2, "loss": 1.0, "time": time.time()})
    assert entry.cells()["state"] == "running"
    entry.begin(time.time() + 10)  # once more
    assert entry.cells()["state"] == "queued"


def test_a_line_a_change_where_there_is_no_terminal(tmp_path):
    (entry,) = entries_of(tmp_path, "seed=0")
    shown = view.View([entry], stream=(stream := io.StringIO()))
    record(entry)
    (entry.folder.path / "log.txt").write_text("$ command\n")
    entry.begin(time.time())
    for _ in range(2):
        shown.update()
    record(entry, {"step": 1, "loss": 0.5})
    for _ in range(2):
        shown.update()
    lines = [re.sub(r"  \d+:\d+$", "", line) for line in stream.getvalue().splitlines()]
    assert lines == ["seed=0  compiling  0/3", "seed=0  running  1/3  loss 0.500"]


def test_time_left(tmp_path):
    first, second, *waiting = entries_of(tmp_path, "seed=0:6;steps=100")
    assert view.seconds_left([first, second, *waiting], 2) is None
    now = time.time()
    first.begin(now - 40)
    record(first, {"step": 10, "loss": 1.0, "time": now - 30})
    assert first.cells()["left"] == ""  # at one step there is no pace
    record(first, {"step": 40, "loss": 1.0, "time": now})
    assert first.cells()["left"] == "1:00"  # 60 steps of a second
    # It takes 100 seconds in all, and so do five others, of which none has a pace; two at a time.
    second.begin(now)
    assert view.seconds_left([first, second, *waiting], 2) == pytest.approx((60 + 500) / 2, abs=2)
    assert view.seconds_left([first], 2) == pytest.approx(60, abs=1)
    assert view.summary([first, second], 1).startswith("2 runs: 1 running, 1 queued; about 2:")
    assert view.clock(3725) == "1:02:05"


def test_columns_go_from_the_least_important(tmp_path):
    entries = entries_of(tmp_path, f"group={'x' * 30};seed=0:2")
    now = time.time()
    for entry in entries:
        entry.begin(now - 60)
        for step in (1, 2):
            record(entry, {"step": step, "accuracy": 0.5, "time": now - 5 + step})
            entry.last_row()
    entries[1].error = "error: the disk is full and nothing can be written"
    wide = view.table(entries, 200)
    assert wide[0].split() == ["run", "state", "step", "accuracy", "left", "time", "error"]
    columns = {width: view.table(entries, width)[0].split() for width in (95, 79, 64, 40)}
    assert columns[95] == wide[0].split()
    assert columns[79] == ["run", "state", "step", "left", "error"]
    assert columns[64] == ["run", "state", "step", "error"]
    assert columns[40] == ["run", "state", "error"]
    for width in (95, 79, 64, 40, 20, 5, 1):
        lines = view.table(entries, width)
        assert all(len(line) <= width for line in lines)
    # Names differ at their ends.
    assert [line.split()[0][-4:] for line in view.table(entries, 40)[1:]] == ["ed=0", "ed=1"]


@pytest.mark.parametrize("odd", [10**30, "x", [1], 2**63])
def test_a_column_of_several_kinds_is_text(odd):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    rows = [{"steps": 3}, {"steps": odd}, {}]
    found = parquet.read_table(io.BytesIO(records.to_parquet(rows, ["steps"]))).to_pylist()
    assert [row["steps"] for row in found] == ["3", records.spell(odd), None]
