"""Programs that are compiled when they are first called for, and say so."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from deltaproduct_jax.training.progress import Stopwatch, compiling


class CompiledByLength:
    """A function (length, *arrays), compiled once a length, outside the account of training."""

    def __init__(
        self,
        function: Callable,
        name: str,
        stopwatch: Stopwatch,
        *,
        donate: bool = False,
        compiler_options: dict[str, str] | None = None,
    ):
        self._function = function
        self._name = name
        self._stopwatch = stopwatch
        self._options = {
            "donate_argnums": (0,) if donate else (),
            "compiler_options": compiler_options,
        }
        self._lowered: dict[int, jax.stages.Lowered] = {}
        self._compiled: dict[int, Callable] = {}

    def lower(self, length: int, *arrays: Any) -> None:
        """Makes the program for ``length``, for a later call to compile and run."""
        jitted = jax.jit(partial(self._function, length), **self._options)
        with self._compiling(length):
            self._lowered[length] = jitted.lower(*arrays)

    def _compiling(self, length: int) -> contextlib.AbstractContextManager[None]:
        return compiling(f"{self._name}, sequences of {length} tokens")

    def __call__(self, length: int, *arrays: Any) -> Any:
        """Calls the function; ``arrays`` keep their shapes from call to call."""
        if length not in self._compiled:
            with self._stopwatch.paused():
                if length not in self._lowered:
                    self.lower(length, *arrays)
                with self._compiling(length):
                    self._compiled[length] = self._lowered.pop(length).compile()
        return self._compiled[length](*arrays)
