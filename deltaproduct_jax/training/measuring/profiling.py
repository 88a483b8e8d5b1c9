"""A trace of a few steps, for TensorBoard's profiler and Perfetto."""

from pathlib import Path
from typing import Any

import jax

PROFILE = "profile"  # folder of a run directory


class Profiler:
    """Traces the steps from ``first`` to ``last``, both of them; none where there are none.

    Args:
        steps: (first, last), or None.
        directory: where each process writes its trace.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps = steps
        self._directory = directory
        self._is_running = False

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the trace before ``step``; waits for ``state`` where it does either."""
        if self._steps is None:
            return
        first, last = self._steps
        if step > last:
            self.close(state)
        elif step == first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._is_running = True

    def close(self, state: Any = None) -> None:
        """Ends the trace, if one runs, once ``state`` is there."""
        if self._is_running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._is_running = False
