"""Signals that ask a process to end: it finishes what it is at, and a second one ends it at once.

A loop asks a `StopRequest` between its steps and raises `Stopped` once everything is saved. The
request is one object, so that whatever else may end a run early can set it too. A run answers a
signal at once, by a line on standard error. What has no steps is interrupted where it is.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from deltaproduct_jax.parallel import processes

# Ctrl-C, what schedulers and `kill` send, and a terminal that is closed.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
CLEAR_LINE = "\r\x1b[2K"  # of a terminal, which may show a bar or a notice
SAVING = "the run ends after what it is doing now, and is saved"
GRACE_S = 5.0  # for what is interrupted to clear up, or to come back from a compiler to Python


_asked = threading.Event()


def was_asked() -> bool:
    """Whether this process has heard a signal, so that one more would not let it save."""
    return _asked.is_set()


class Stopped(KeyboardInterrupt):
    """Work was ended on request, saved; the text says how to go on."""

    def __init__(self, text: str, signal_number: int):
        super().__init__(text)
        self.exit_code = exit_code(signal_number)


def exit_code(signal_number: int) -> int:
    """What a shell reports after a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + signal_number


def spoken(signal_number: int) -> str:
    """A signal as one speaks of it."""
    is_key = signal_number == signal.SIGINT
    return "Ctrl-C" if is_key else signal.Signals(signal_number).name


class StopRequest:
    """Whether, and by which signal, this process was asked to end.

    Attributes:
        answer: what a signal is answered by, on standard error; None for no word.
    """

    def __init__(self, answer: str | None = None):
        self._event = threading.Event()
        self.signal_number = 0
        self.answer = answer

    def set(self, signal_number: int) -> None:
        """Asks for the end."""
        self.signal_number = signal_number
        self._event.set()

    def is_set(self) -> bool:
        """Whether the end was asked for."""
        return self._event.is_set()

    def was_asked(self) -> bool:
        """Whether this very process was asked."""
        return self.is_set()

    def reached(self, step: int) -> bool:
        """Whether to end behind ``step``; a loop asks at every step."""
        return self.is_set()

    @contextlib.contextmanager
    def answering(self, answer: str) -> Iterator[None]:
        """Inside, a signal is answered by something else."""
        before, self.answer = self.answer, answer
        try:
            yield
        finally:
            self.answer = before

    def wait(self, seconds: float) -> bool:
        """Sleeps, not beyond the request; whether there is one."""
        return self._event.wait(seconds)

    def close(self) -> None:
        """Nobody asks any more."""

    @property
    def name(self) -> str:
        """The signal as one speaks of it."""
        return spoken(self.signal_number)


class SharedStopRequest(StopRequest):
    """The same for the processes of one run: it is set in all of them behind the same step."""

    def __init__(self, answer: str | None = None):
        super().__init__(answer)
        self._asked = threading.Event()
        self._agreement = processes.Agreement()

    def set(self, signal_number: int) -> None:
        """Asks all processes for the end."""
        self._asked.set()
        self._agreement.ask()

    def was_asked(self) -> bool:
        """Whether this very process was asked."""
        return self._asked.is_set()

    @contextlib.contextmanager
    def answering(self, answer: str) -> Iterator[None]:
        """Nothing else: what one process has heard ends nothing before the others know of it."""
        yield

    def reached(self, step: int) -> bool:
        """Whether all are to end behind ``step``."""
        if self._agreement.reached(step):
            super().set(signal.SIGTERM)
        return self.is_set()

    def close(self) -> None:
        """Listens to the others no more."""
        self._agreement.close()


@contextlib.contextmanager
def stop_on_signals(answer: str | None = None) -> Iterator[StopRequest]:
    """Inside, signals set the request instead of raising or killing; a second one ends the process.

    Only a process's main thread can take signals; in another the request is never set by them.

    Args:
        answer: what the first is answered by at once, while the main thread may be in a compiler;
            None for no word.
    """
    request = (SharedStopRequest if processes.are_joined() else StopRequest)(answer)

    def watch(receiving: int, numbers: list[int]) -> None:
        while number := _next(receiving, numbers):
            if request.was_asked():
                os._exit(exit_code(number))
            request.set(number)
            if request.answer is not None:
                _say(f"{spoken(number)}: {request.answer}; a second one ends it at once")

    with contextlib.closing(request), _heard(lambda *_: None, watch):
        yield request


@contextlib.contextmanager
def interrupted_by_signals(request: StopRequest, says: Callable[[], str]) -> Iterator[None]:
    """Inside, a signal raises KeyboardInterrupt, whichever it is, and sets the request.

    It may arrive as this begins or ends as well, so that it is caught outside. A second one ends
    the process at once, and so does the first where `GRACE_S` later what is inside has not ended:
    it may be in a compiler, or wait for a thread.

    Args:
        request: what is set.
        says: the line that such an end leaves on standard error.
    """
    is_over = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        if not is_over.is_set():
            is_over.set()
            request.set(number)
            raise KeyboardInterrupt

    def end(number: int) -> None:
        _say(says())
        os._exit(exit_code(number))

    def watch(receiving: int, numbers: list[int]) -> None:
        timer = None
        while number := _next(receiving, numbers):
            if timer is not None:
                end(number)
            request.set(number)
            timer = threading.Timer(GRACE_S, end, [number])
            timer.daemon = True
            timer.start()
        if timer is not None:
            timer.cancel()

    with _heard(interrupt, watch):
        try:
            yield
        finally:
            is_over.set()


def _say(text: str) -> None:
    """A line on standard error, whatever the main thread is at; on a terminal a line of its own."""
    with contextlib.suppress(OSError):  # a terminal that is closed
        os.write(2, f"{CLEAR_LINE if os.isatty(2) else ''}{text}\n".encode())


@contextlib.contextmanager
def _heard(
    handler: Callable[[int, object], None], watch: Callable[[int, list[int]], None]
) -> Iterator[None]:
    """Inside, signals call ``handler`` in the main thread, and are written to a pipe.

    There ``watch`` reads them at once, in a thread: Python runs handlers between its own
    instructions, which a compilation of minutes holds up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    # What is ignored stays so: nohup and shells without job control ignore some on purpose.
    known = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    numbers = [number for number in known if signal.getsignal(number) != signal.SIG_IGN]
    before = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, args=(receiving, numbers), daemon=True)
    watcher.start()
    handlers = {}
    try:
        for number in numbers:
            handlers[number] = signal.signal(number, handler)
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler_before in handlers.items():
            signal.signal(number, handler_before)
        os.close(sending)
        watcher.join()
        os.close(receiving)


def _next(receiving: int, numbers: list[int]) -> int | None:
    """The next signal of these; None where no more are heard."""
    while data := os.read(receiving, 1):
        if data[0] in numbers:  # not a signal of somebody else's
            _asked.set()
            return data[0]
    return None
