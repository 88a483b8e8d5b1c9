"""How a run shows its progress: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from deltaproduct_jax.parallel import processes


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
            "loss": f"{row['loss']:.4f}",
            "accuracy": f"{row['accuracy']:.3f}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
        }
        if "valid_sequence_accuracy" in row:
            shown["valid"] = f"{row['valid_sequence_accuracy']:.3f}"
        if "bits_per_byte" in row:
            shown["bits/byte"] = f"{row['bits_per_byte']:.3f}"
        if "valid_bits_per_byte" in row:
            shown["valid"] = f"{row['valid_bits_per_byte']:.3f}"
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
