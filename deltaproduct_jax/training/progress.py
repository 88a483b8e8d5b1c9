"""How a run shows its progress, and that it compiles: a bar on a terminal, else plain lines."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from deltaproduct_jax.parallel import processes
from deltaproduct_jax.training.stopping import CLEAR_LINE

# Of a compilation that goes on: the first notice and those after it, on a terminal and elsewhere.
NOTICES_S = {True: (2.0, 1.0), False: (10.0, 30.0)}


class Stopwatch:
    """Time spent training since the last look; compiling and evaluating are left out."""

    def __init__(self):
        self._since = time.perf_counter()
        self._out = 0.0
        self._is_paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the account; pauses may nest."""
        if self._is_paused:
            yield
            return
        self._is_paused, began = True, time.perf_counter()
        try:
            yield
        finally:
            self._is_paused = False
            self._out += time.perf_counter() - began

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        now = time.perf_counter()
        seconds = now - self._since - self._out
        self._since, self._out = now, 0.0
        return seconds


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Says on standard error that ``what`` is being compiled, and since when, if that takes long.

    A line every half a minute, or on a terminal one that counts the seconds and vanishes.
    """
    if not processes.is_first():
        yield
        return
    done, on_terminal = threading.Event(), sys.stderr.isatty()
    watcher = threading.Thread(target=_say_compiling, args=(what, done, on_terminal), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _say_compiling(what: str, done: threading.Event, on_terminal: bool) -> None:
    began = time.perf_counter()
    wait, every = NOTICES_S[on_terminal]
    begin, end = (CLEAR_LINE, "") if on_terminal else ("", "\n")
    said = False
    while not done.wait(wait):
        seconds = time.perf_counter() - began
        text = f"{begin}compiling {what}, {seconds:.0f} s so far"
        print(text, end=end, file=sys.stderr, flush=True)
        said, wait = True, every
    if said and on_terminal:
        print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


class Progress:
    """Loss, accuracy, tokens per second and time left, on standard error."""

    def __init__(self, first_step: int, steps: int):
        self._steps = steps
        self._first = first_step
        self._began = time.perf_counter()
        self._bar = None
        self._is_shown = processes.is_first()
        if self._is_shown and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def show(self, row: dict[str, Any]) -> None:
        """Shows one row of metrics."""
        if not self._is_shown:
            return
        shown = {
            "loss": f"{row['loss']:.4f}" if "loss" in row else "not finite",
            "accuracy": f"{row['accuracy']:.3f}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
        }
        if "valid_sequence_accuracy" in row:
            shown["valid"] = f"{row['valid_sequence_accuracy']:.3f}"
        if "bits_per_byte" in row:
            shown["bits/byte"] = f"{row['bits_per_byte']:.3f}"
        if "valid_bits_per_byte" in row:
            shown["valid"] = f"{row['valid_bits_per_byte']:.3f}"
        elif "valid_token_accuracy" in row and "valid" not in shown:
            shown["valid"] = "not finite"
        if row.get("skipped_steps"):
            shown["skipped"] = f"{row['skipped_steps']}"
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(row["step"] - self._bar.n)
            return
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        print(
            f"step {row['step']}/{self._steps}  {text}  {self._left(row['step'])}",
            file=sys.stderr,
            flush=True,
        )

    def _left(self, step: int) -> str:
        spent = time.perf_counter() - self._began
        left = spent / max(step - self._first, 1) * (self._steps - step)
        return f"left {int(left) // 60}:{int(left) % 60:02d}"

    def close(self) -> None:
        """Leaves the terminal's line."""
        if self._bar is not None:
            self._bar.close()
