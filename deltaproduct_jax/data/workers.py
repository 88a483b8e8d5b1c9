"""The same function on many items, by processes that do not outlive the one that started them."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self, TypeVar

from tqdm import tqdm

from deltaproduct_jax.errors import RunDirectoryError

Item = TypeVar("Item")
Result = TypeVar("Result")
LINE_EVERY_S = 10.0  # where there is no terminal for a bar


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    sizes: Sequence[int],
    processes: int,
    what: str,
    *,
    in_threads: bool = False,
) -> list[Result]:
    """``[function(item) for item in items]``, with a progress bar over the sum of ``sizes``.

    Args:
        function: can be pickled; is called here if one worker is enough.
        items: what it is called with.
        sizes: bytes of each, for the bar.
        processes: how many work at once.
        what: is being done, for the bar.
        in_threads: of this process instead, for work that leaves Python alone.

    Raises:
        RunDirectoryError: a process was killed.
        Exception: what ``function`` raised; items that nobody has begun are left.
    """
    results: dict[int, Result] = {}
    progress = Progress(sum(sizes), what)
    workers = min(processes, len(items))
    with contextlib.ExitStack() as ending:
        ending.callback(progress.close)
        if workers <= 1:
            done = ((index, function(item)) for index, item in enumerate(items))
        elif in_threads:
            threads = ThreadPoolExecutor(workers)
            ending.callback(threads.shutdown, cancel_futures=True)
            done = _by(threads, function, items)
        else:
            done = _by(ending.enter_context(Processes(workers)), function, items)
        for index, result in done:
            results[index] = result
            progress.add(sizes[index])
    return [results[index] for index in range(len(items))]


class Processes:
    """Worker processes that end where this one does, and where it is interrupted."""

    def __init__(self, workers: int):
        # Not forked: threads of JAX's and of tokenizers', which are here, would not outlive a fork.
        spawn = multiprocessing.get_context("spawn")
        self._ending, self._alive = spawn.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(workers, spawn, _end_with_parent, (self._ending,))

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """As of every executor."""
        with _signals_held():  # of a terminal's all get one; this process alone says what it did
            return self._pool.submit(function, *arguments)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for what is begun, or ends it, if this process is interrupted."""
        if kind is not None and not issubclass(kind, Exception):
            self._alive.close()
        self._pool.shutdown(cancel_futures=True)
        self._alive.close()
        self._ending.close()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Inside, Ctrl-C waits; a process that is started inside never hears it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _by(
    pool: Processes | ThreadPoolExecutor, function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[int, Result]]:
    try:
        futures = {pool.submit(function, item): index for index, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise RunDirectoryError(
            "a worker process was killed, perhaps for want of memory; the same command goes on, "
            "and --workers=1 needs the least"
        ) from error


def _end_with_parent(ending: multiprocessing.connection.Connection) -> None:
    """A worker waits for work on a pipe that it holds open itself: a kill above it goes unseen."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel, ending])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Progress:
    """Bytes done, on standard error: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, what: str):
        self._total, self._what, self._done = total, what, 0
        self._began = self._shown = time.perf_counter()
        self._bar = None
        if sys.stderr.isatty() and total:
            self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True)

    def add(self, size: int) -> None:
        """``size`` more bytes are done."""
        self._done += size
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(size)
        elif now - self._shown >= LINE_EVERY_S:
            self._shown = now
            rate = self._done / (now - self._began)
            print(
                f"{self._what} {self._done / 1e6:,.0f}/{self._total / 1e6:,.0f} MB  "
                f"{rate / 1e6:,.1f} MB/s  left {(self._total - self._done) / rate:,.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leaves the terminal's line."""
        if self._bar is not None:
            self._bar.close()
