"""Programs that are compiled once for each length, and how many of their calls are under way."""

import collections
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from deltaproduct_jax.data.workers import cores
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.measuring.memory import within_memory
from deltaproduct_jax.training.progress import Stopwatch, compiling
from deltaproduct_jax.training.source import Source
from deltaproduct_jax.training.stopping import StopRequest

LEAST_WIDTH_BY_CUBLAS = 1024  # channels; with 128 XLA's own kernels win some products
SPLITS = ("valid", "test")  # that a run is evaluated on, in their order
ENDING = "the run ends once what compiles now has compiled, and what was saved stays"
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

    What `prepare` has not made is made at the first call. ``sized_by``: the settings that its
    memory depends on, for a user who has too little.
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
        self.name = name
        self._sized_by = sized_by
        self._stopwatch = stopwatch
        self._options = {
            "donate_argnums": (0,) if donate else (),
            "compiler_options": compiler_options,
        }
        self._compiled: dict[int, Callable] = {}

    def __call__(self, length: int, *arrays: Any) -> Any:
        """Calls the function; ``arrays`` keep their shapes from call to call."""
        if jax.config.jax_disable_jit:  # JAX then calls nothing that was compiled before
            return self._function(length, *arrays)
        if not self.has(length):
            prepare([Wanted(self, length, arrays)], self._stopwatch)
        return self._compiled[length](*arrays)

    def has(self, length: int) -> bool:
        """Whether the program for ``length`` is there, or none is wanted."""
        return jax.config.jax_disable_jit or length in self._compiled

    def lower(self, length: int, arrays: Iterable[Any]) -> jax.stages.Lowered:
        """The program for ``length`` before it is compiled."""
        return jax.jit(partial(self._function, length), **self._options).lower(*arrays)

    def compile(self, length: int, lowered: jax.stages.Lowered) -> None:
        """Makes the program of what :meth:`lower` gave; ConfigError if memory is short."""
        what = f"{self.name}, sequences of {length} tokens, {self._sized_by}"
        self._compiled[length] = within_memory(lowered, what)


class Wanted(NamedTuple):
    """A program that is to be made; of ``arrays`` only shapes and places matter."""

    function: CompiledByLength
    length: int
    arrays: Iterable[Any]


def prepare(
    wanted: Iterable[Wanted],
    stopwatch: Stopwatch,
    implementation: str | None = None,
    request: StopRequest | None = None,
) -> None:
    """Makes those programs that are not there, several side by side (`compiled_at_once`).

    Lowering is Python's, so one program is lowered after another, while those before it compile.
    No step may be under way: it would be slowed down, and compilers for GPUs, which time kernels,
    would want memory beside its own. Once a ``request`` for the end is set, no further one is
    begun; the caller then ends before it calls any.

    Raises:
        ConfigError: one needs more memory than there is, or ``implementation``, which the user has
            named, has none for this machine.
    """
    missing = (each for each in wanted if not each.function.has(each.length))
    wanted = list({each[:2]: each for each in missing}.values())
    if not wanted:
        return
    request = StopRequest() if request is None else request

    def make(function: CompiledByLength, length: int, lowered: jax.stages.Lowered) -> None:
        if not request.is_set():
            function.compile(length, lowered)

    names = " and ".join(dict.fromkeys(each.function.name for each in wanted))
    lengths = ", ".join(map(str, sorted({each.length for each in wanted})))
    with (
        stopwatch.paused(),
        request.answering(ENDING),
        compiling(f"{names}, sequences of {lengths} tokens"),
        ThreadPoolExecutor(compiled_at_once()) as pool,
    ):
        under_way: list[Future] = []
        try:
            for function, length, arrays in wanted:
                if request.is_set():
                    break
                lowered = function.lower(length, arrays)
                under_way.append(pool.submit(make, function, length, lowered))
            for each in under_way:
                each.result()
        except ValueError as error:
            if implementation is None:
                raise
            raise ConfigError(str(error)) from error
        finally:  # after an error, what has not begun is left
            pool.shutdown(cancel_futures=True)


def compiled_at_once() -> int:
    """Programs that XLA compiles at a time.

    Several processes compile in the same order, since they may wait for each other in between. And
    the compiler for CPUs keeps all cores busy with one program: with two, eight programs of a small
    run took a seventh more processor time and half as much memory again.
    """
    return 1 if jax.process_count() > 1 or jax.default_backend() == "cpu" else cores()


def trained_after(
    step: int, config: RunConfig, train_step: CompiledByLength, arguments: Sequence[Any]
) -> list[Wanted]:
    """The programs of all steps behind ``step``, the next one first, called with ``arguments``."""
    lengths = dict.fromkeys(map(config.length_at, range(step + 1, config.train.steps + 1)))
    return [Wanted(train_step, length, arguments) for length in lengths]


def evaluated_with(
    config: RunConfig,
    source: Source,
    eval_step: CompiledByLength,
    arguments: Callable[[Any], Sequence[Any]],
    splits: Iterable[str] = SPLITS,
) -> list[Wanted]:
    """The programs of all evaluations on ``splits``.

    Args:
        config: of the run.
        source: of its batches.
        eval_step: what is to be made.
        arguments: what it is called with, of what the source gives it.
        splits: of `SPLITS`.
    """
    lengths = {"valid": (config.select_length,), "test": config.task.test_lengths}
    return [
        Wanted(eval_step, length, arguments(next(iter(source.evaluation(split, length)))))
        for split in splits
        for length in lengths[split]
    ]


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
