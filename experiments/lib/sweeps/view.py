"""How a sweep shows itself: on a terminal a table redrawn in place, else a line per change."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from deltaproduct_jax.errors import RunDirectoryError
from experiments.lib.sweeps.records import LOG, RunFolder

# In this order on a terminal that is too low for all.
STATES = ("running", "compiling", "queued", "failed", "elsewhere", "done", "waiting")
COLUMNS = ("run", "state", "step", "accuracy", "left", "time", "error")
# On a terminal that is too narrow for all, these go, one after another; the rest stay.
FIRST_TO_GO = ("time", "accuracy", "left", "step")
REDRAW_S = 1.0
NAME_WIDTH = 60
# So much of an error and of a name stays at least, before a column goes for it.
LEAST_ERROR, LEAST_NAME = 20, 24
GAP = "  "


class Entry:
    """A run as a sweep sees it; ``state`` is what the sweep knows: "running" is also compiling."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.name = folder.run.name
        self.steps = folder.run.config["train"]["steps"]
        self.state = "waiting"
        self.failures = 0
        self.error = ""
        self.seconds = folder.seconds()
        self._began = 0.0
        self._first: dict[str, float] | None = None  # row of the attempt under way

    def begin(self, began: float) -> None:
        """An attempt has begun, at a time in seconds since 1970."""
        self.state, self._began, self._first = "running", began, None

    def is_done(self) -> bool:
        """Whether there are results; the state says so then."""
        if self.folder.results() is None:
            return False
        self.state, self.error = "done", ""
        return True

    def last_row(self) -> dict[str, float]:
        """The last row of an unfinished run, empty without any; RunDirectoryError if damaged."""
        if self.state == "waiting" or self.folder.results() is not None:
            return {}
        row = self.folder.last_row()
        is_of_now = bool(row) and row.get("time", self._began) >= self._began
        if self.state == "running" and self._first is None and is_of_now:
            self._first = row | {"time": row.get("time", time.time())}
        return row

    def shown_state(self) -> str:
        """The state as one of `STATES`; whoever runs and has no step on record compiles."""
        if self.state != "running" or self._first is not None:
            return self.state
        log = self.folder.path / LOG  # a run writes there first of all
        is_begun = log.exists() and log.stat().st_mtime >= self._began - 1
        return "compiling" if is_begun else "queued"

    def seconds_left(self, row: Mapping[str, float]) -> float | None:
        """Until the last step, at the pace of this attempt; None where it has none yet."""
        if self.state != "running" or self._first is None or not row:
            return None
        steps = row["step"] - self._first["step"]
        if steps <= 0:
            return None
        pace = (row.get("time", time.time()) - self._first["time"]) / steps
        return pace * (self.steps - row["step"])

    def seconds_spent(self) -> float:
        """In the attempt under way, or in those that ended."""
        return time.time() - self._began if self.state == "running" else self.seconds

    def cells(self) -> dict[str, str]:
        """The columns as they are shown."""
        results, row, error = self.folder.results(), {}, self.error
        try:
            row = self.last_row()
        except RunDirectoryError as damaged:
            error = error or str(damaged)
        step = row.get("step", 0) if results is None else results.get("steps", self.steps)
        left = self.seconds_left(row)
        return {
            "run": self.name,
            "state": self.shown_state() + (f" ({self.failures} failed)" if self.failures else ""),
            "step": f"{step}/{self.steps}",
            "accuracy": final(results) if results is not None else latest(row),
            "left": "" if left is None else clock(left),
            "time": clock(self.seconds_spent()) if self.seconds_spent() else "",
            "error": error,
        }


def clock(seconds: float) -> str:
    """A time as 1:05, or 2:01:05 from an hour on; none where a machine's clock was set back."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def final(results: dict[str, Any]) -> str:
    """Sequence accuracy at every test length, as length:accuracy."""
    return " ".join(
        f"{entry['length']}:{entry['strict']['sequence_accuracy']:.3f}"
        for entry in results.get("test", [])
        if "strict" in entry
    )


def latest(row: dict[str, float]) -> str:
    """What the last row says of an unfinished run."""
    names = {"valid_sequence_accuracy": "valid", "accuracy": "train accuracy", "loss": "loss"}
    return next((f"{text} {row[name]:.3f}" for name, text in names.items() if name in row), "")


def table(entries: Sequence[Entry], width: int | None = None) -> list[str]:
    """Lines of a table of the runs, none longer than ``width``.

    What is empty for all runs has no column. Where the rest is too wide, names lose their middles,
    then the columns go that say least.
    """
    rows = [dict(zip(COLUMNS, COLUMNS, strict=True)), *(entry.cells() for entry in entries)]
    shown = [name for name in COLUMNS if any(row[name] for row in rows[1:])] or ["run"]
    sizes = {name: max(len(row[name]) for row in rows) for name in shown}
    sizes["run"] = min(sizes["run"], NAME_WIDTH)
    if width is not None:
        shown = _fitting(shown, sizes, width)
    lines = []
    for row in rows:
        cells = [
            row[name] if name == "error" else shortened(row[name], sizes[name]).ljust(sizes[name])
            for name in shown
        ]
        lines.append(GAP.join(cells).rstrip()[:width])
    return lines


def _fitting(shown: list[str], sizes: dict[str, int], width: int) -> list[str]:
    """The columns that there is room for; names are made shorter in ``sizes`` if need be."""

    def needed(run: int) -> int:
        least = {"run": run, "error": min(sizes["error"], LEAST_ERROR)}
        return sum((sizes | least)[name] for name in shown) + len(GAP) * (len(shown) - 1)

    sizes.setdefault("error", 0)
    for name in FIRST_TO_GO:
        if needed(min(sizes["run"], LEAST_NAME)) > width:
            shown = [other for other in shown if other != name]
    sizes["run"] -= min(max(0, needed(sizes["run"]) - width), sizes["run"] - 1)
    return shown


def shortened(text: str, width: int) -> str:
    """A text without its middle where it is longer than ``width``; names differ at their ends."""
    if len(text) <= width:
        return text
    if width < 5:
        return text[:width]
    head = (width - 2) // 2
    return f"{text[:head]}..{text[len(text) - (width - 2 - head) :]}"


def summary(entries: Sequence[Entry], at_a_time: int = 1) -> str:
    """How many runs are in which state, and how long the rest takes if ``at_a_time`` run."""
    counts = Counter(entry.shown_state() for entry in entries)
    parts = [f"{counts[state]} {state}" for state in STATES if counts[state]]
    left = seconds_left(entries, at_a_time)
    estimate = "" if left is None else f"; about {clock(left)} left"
    return f"{len(entries)} runs: {', '.join(parts)}{estimate}"


def seconds_left(entries: Sequence[Entry], at_a_time: int) -> float | None:
    """Until the last run ends; None where nothing is left, or no run has a pace yet."""
    left, whole, waiting = [], [], 0
    for entry in entries:
        if entry.state == "done" and entry.seconds:
            whole.append(entry.seconds)
        elif entry.state == "running":
            try:
                own = entry.seconds_left(entry.last_row())
            except RunDirectoryError:
                own = None
            if own is None:
                waiting += 1
            else:
                left.append(own)
                whole.append(own + entry.seconds_spent())
        elif entry.state == "waiting":
            waiting += 1
    if not (left or waiting) or not whole:
        return None
    rest = sum(left) + waiting * sum(whole) / len(whole)
    return max([*left, rest / max(1, min(at_a_time, len(left) + waiting))])


class View:
    """Shows the runs as they change, on ``stream`` (standard output by default).

    Args:
        entries: the runs.
        at_a_time: how many of them run at once.
        stream: where it is shown.
    """

    def __init__(self, entries: Sequence[Entry], at_a_time: int = 1, stream: TextIO | None = None):
        self._entries = entries
        self._at_a_time = at_a_time
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = {entry.name: self._change_of(entry) for entry in entries}
        self._note = ""
        self._drawn = 0
        self._next = 0.0

    def update(self) -> None:
        """Draws the table anew if a second has passed, or prints a line for every changed run."""
        if not self._live:
            self._print_changes()
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + REDRAW_S
            self._redraw()

    def say(self, text: str) -> None:
        """Shows a line from now on, below the table."""
        self._note = text
        if self._live:
            self._redraw()
        else:
            print(text, file=self._stream, flush=True)

    def _change_of(self, entry: Entry) -> tuple[str, int]:
        return entry.shown_state(), entry.failures

    def _print_changes(self) -> None:
        for entry in self._entries:
            cells = entry.cells() if entry.state == "running" else None  # may show its first row
            change = self._change_of(entry)
            if self._shown[entry.name] == change:
                continue
            self._shown[entry.name] = change
            shown = GAP.join(filter(None, (cells or entry.cells()).values()))
            print(shown, file=self._stream, flush=True)

    def _redraw(self) -> None:
        size = shutil.get_terminal_size()
        order = sorted(self._entries, key=lambda entry: STATES.index(entry.shown_state()))
        below = [self._note] if self._note else []
        room = max(1, size.lines - 3 - len(below))
        lines = table(order[:room], size.columns - 1)
        hidden = f"; {len(order) - room} not shown" if len(order) > room else ""
        below = [summary(order, self._at_a_time) + hidden, *below]
        lines += [line[: size.columns - 1] for line in below]
        # The cursor is where Ctrl-C has left it, behind a "^C" that the terminal itself shows.
        up = "\r" + (f"\x1b[{self._drawn}A" if self._drawn else "")
        print(up + "".join(f"\x1b[2K{line}\n" for line in lines), end="\x1b[J", file=self._stream)
        self._stream.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        """Leaves the last state of all runs behind."""
        self._note = ""
        if self._live:
            self._redraw()
        else:
            self._print_changes()
            for line in [*table(self._entries), summary(self._entries, self._at_a_time)]:
                print(line, file=self._stream)
