"""How a sweep shows itself: on a terminal a table redrawn in place, else a line per change."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

from deltaproduct_jax.errors import RunDirectoryError
from experiments.lib.sweeps.records import RunFolder

# In this order on a terminal that is too low for all.
STATES = ("running", "failed", "elsewhere", "done", "waiting")
REDRAW_S = 1.0
NAME_WIDTH = 60


class Entry:
    """A run as a sweep sees it; ``state`` is one of STATES."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.name = folder.run.name
        self.steps = folder.run.config["train"]["steps"]
        self.state = "waiting"
        self.failures = 0
        self.error = ""
        self.began: float | None = None
        self.seconds = folder.seconds()
        self.look_again = 0.0

    def cells(self) -> tuple[str, ...]:
        """State, progress, accuracy, time and error."""
        results, row, error = self.folder.results(), {}, self.error
        if results is None and self.state != "waiting":
            try:
                row = self.folder.last_row()
            except RunDirectoryError as damaged:
                error = error or str(damaged)
        step = row.get("step", 0) if results is None else results.get("steps", self.steps)
        accuracy = final(results) if results is not None else latest(row)
        seconds = self.seconds
        if self.state == "running" and self.began is not None:
            seconds = time.monotonic() - self.began
        spent = f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if seconds else ""
        failures = f" ({self.failures} failed)" if self.failures else ""
        return self.state + failures, f"{step}/{self.steps}", accuracy, spent, error


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
    """Lines of a table of the runs, cut to ``width``."""
    head = ("run", "state", "step", "accuracy", "time", "error")
    rows = [head] + [(entry.name[:NAME_WIDTH], *entry.cells()) for entry in entries]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    lines = []
    for *cells, error in rows:
        padded = [cell.ljust(size) for cell, size in zip(cells, widths, strict=True)]
        lines.append("  ".join([*padded, error]).rstrip()[:width])
    return lines


def summary(entries: Sequence[Entry]) -> str:
    """How many runs are in which state."""
    counts = Counter(entry.state for entry in entries)
    parts = [f"{counts[state]} {state}" for state in STATES if counts[state]]
    return f"{len(entries)} runs: {', '.join(parts)}"


class View:
    """Shows the runs as they change, on ``stream`` (standard output by default)."""

    def __init__(self, entries: Sequence[Entry], stream: TextIO | None = None):
        self._entries = entries
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = {entry.name: (entry.state, entry.failures) for entry in entries}
        self._drawn = 0
        self._next = 0.0

    def update(self) -> None:
        """Draws the table anew if a second has passed, or prints a line for every changed run."""
        if not self._live:
            self._print_changes()
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + REDRAW_S
            self._redraw()

    def _print_changes(self) -> None:
        for entry in self._entries:
            change = (entry.state, entry.failures)
            if self._shown[entry.name] == change:
                continue
            self._shown[entry.name] = change
            shown = "  ".join(filter(None, [entry.name, *entry.cells()]))
            print(shown, file=self._stream, flush=True)

    def _redraw(self) -> None:
        size = shutil.get_terminal_size()
        order = sorted(self._entries, key=lambda entry: STATES.index(entry.state))
        room = max(1, size.lines - 3)
        lines = table(order[:room], size.columns - 1)
        hidden = f"; {len(order) - room} not shown" if len(order) > room else ""
        lines.append((summary(order) + hidden)[: size.columns - 1])
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        print(up + "".join(f"\x1b[2K{line}\n" for line in lines), end="\x1b[J", file=self._stream)
        self._stream.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        """Leaves the last state of all runs behind."""
        if self._live:
            self._redraw()
        else:
            self._print_changes()
            for line in [*table(self._entries), summary(self._entries)]:
                print(line, file=self._stream)
