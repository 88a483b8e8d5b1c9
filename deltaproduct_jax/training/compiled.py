"""Programs that are compiled when they are first called for, and how many calls are under way."""

import collections
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from deltaproduct_jax.training.measuring.memory import within_memory
from deltaproduct_jax.training.progress import Stopwatch, compiling

LEAST_WIDTH_BY_CUBLAS = 1024  # channels; with 128 XLA's own kernels win some products
MOST_UNDER_WAY = 2  # one that runs, and one that begins as soon as it has ended


def compiler_options(mesh: Mesh, hidden_size: int) -> dict[str, str | bool] | None:
    """What a step is compiled with beside XLA's own choices.

    On a GPU cuBLAS makes all matrix products of wide models, with sums in front of them and behind,
    which XLA leaves apart where its own kernels are tried too: results/gpu/LOG_step.md.
    """
    if mesh.devices.flat[0].platform != "gpu" or hidden_size < LEAST_WIDTH_BY_CUBLAS:
        return None
    return {"xla_gpu_enable_triton_gemm": False}


class CompiledByLength:
    """A function (length, *arrays), compiled once a length, outside the account of training.

    ``sized_by``: the settings that its memory depends on, for a user who has too little.
    """

    def __init__(
        self,
        function: Callable,
        name: str,
        sized_by: str,
        stopwatch: Stopwatch,
        *,
        donate: bool = False,
        compiler_options: dict[str, str | bool] | None = None,
    ):
        self._function = function
        self._name = name
        self._sized_by = sized_by
        self._stopwatch = stopwatch
        self._options = {
            "donate_argnums": (0,) if donate else (),
            "compiler_options": compiler_options,
        }
        self._compiled: dict[int, Callable] = {}

    def prepare(self, length: int, *arrays: Any) -> None:
        """Makes the program for ``length``; of ``arrays`` only shapes and places matter.

        Raises:
            ConfigError: it needs more memory than there is.
        """
        jitted = jax.jit(partial(self._function, length), **self._options)
        what = f"{self._name}, sequences of {length} tokens"
        with self._stopwatch.paused(), compiling(what):
            lowered = jitted.lower(*arrays)
            self._compiled[length] = within_memory(lowered, f"{what}, {self._sized_by}")

    def __call__(self, length: int, *arrays: Any) -> Any:
        """Calls the function; ``arrays`` keep their shapes from call to call."""
        if length not in self._compiled:
            self.prepare(length, *arrays)
        return self._compiled[length](*arrays)


class UnderWay:
    """The steps that are dispatched and may not have ended.

    JAX lets 32 of them wait. They hide nothing that two would not, and a loop that is asked to stop
    would have all of them before it: too long for those who are given half a minute. And devices
    that a CPU simulates share its threads: where many steps wait for each other there, one may come
    40 seconds late to a collective, upon which XLA aborts the process.
    """

    def __init__(self):
        self._results: collections.deque[Any] = collections.deque()

    def add(self, result: Any) -> None:
        """One more, whose ``result`` nobody donates; waits until `MOST_UNDER_WAY` are left."""
        self._results.append(result)
        while len(self._results) > MOST_UNDER_WAY:
            jax.block_until_ready(self._results.popleft())
