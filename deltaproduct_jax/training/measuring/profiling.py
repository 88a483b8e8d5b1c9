"""A trace of a few steps, for TensorBoard's profiler and Perfetto."""

import sys
from pathlib import Path
from typing import Any

import jax

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.parallel import processes

PROFILE = "profile"  # folder of a run directory


class Profiler:
    """Traces the steps from ``first`` to ``last``, both of them; none where there are none.

    A run that goes on in their midst traces those that it makes.

    Args:
        steps: (first, last), or None.
        directory: where each process writes its trace.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps = steps
        self._directory = directory
        self._is_running = False

    def require_within(self, steps: int) -> None:
        """Raises ConfigError unless a run of so many steps makes the first of them."""
        if self._steps is not None and self._steps[0] > steps:
            raise ConfigError(
                "profile_steps='{}:{}' begins behind the last step; ".format(*self._steps)
                + f"its first may be from 1 to steps={steps}"
            )

    def go_on(self, made: int) -> None:
        """Says so where a run has made all of them already, of which there will be no trace."""
        if self._steps is not None and self._steps[1] <= made and processes.is_first():
            text = "profile_steps='{}:{}' writes no trace: ".format(*self._steps)
            print(f"{text}the run goes on after step {made}", file=sys.stderr, flush=True)

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the trace before ``step``; waits for ``state`` where it does either."""
        if self._steps is None:
            return
        first, last = self._steps
        if step > last:
            self.close(state)
        elif step >= first and not self._is_running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._is_running = True

    def close(self, state: Any = None) -> None:
        """Ends the trace, if one runs, once ``state`` is there."""
        if self._is_running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._is_running = False
