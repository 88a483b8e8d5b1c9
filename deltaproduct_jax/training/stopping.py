"""Signals that ask a process to end: it finishes what it is at, and a second one ends it at once.

A loop asks a `StopRequest` between its steps and raises `Stopped` once everything is saved. The
request is one object, so that whatever else may end a run early can set it too.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from deltaproduct_jax.parallel import processes

# Ctrl-C, what schedulers and `kill` send, and a terminal that is closed.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(KeyboardInterrupt):
    """Work was ended on request, saved; the text says how to go on."""

    def __init__(self, text: str, signal_number: int):
        super().__init__(text)
        self.exit_code = exit_code(signal_number)


def exit_code(signal_number: int) -> int:
    """What a shell reports after a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + signal_number


class StopRequest:
    """Whether, and by which signal, this process was asked to end."""

    def __init__(self):
        self._event = threading.Event()
        self.signal_number = 0

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

    def wait(self, seconds: float) -> bool:
        """Sleeps, not beyond the request; whether there is one."""
        return self._event.wait(seconds)

    def close(self) -> None:
        """Nobody asks any more."""

    @property
    def name(self) -> str:
        """The signal as one speaks of it."""
        number = self.signal_number
        return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class SharedStopRequest(StopRequest):
    """The same for the processes of one run: it is set in all of them behind the same step."""

    def __init__(self):
        super().__init__()
        self._asked = threading.Event()
        self._agreement = processes.Agreement()

    def set(self, signal_number: int) -> None:
        """Asks all processes for the end."""
        self._asked.set()
        self._agreement.ask()

    def was_asked(self) -> bool:
        """Whether this very process was asked."""
        return self._asked.is_set()

    def reached(self, step: int) -> bool:
        """Whether all are to end behind ``step``."""
        if self._agreement.reached(step):
            super().set(signal.SIGTERM)
        return self.is_set()

    def close(self) -> None:
        """Listens to the others no more."""
        self._agreement.close()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, signals set the request instead of raising or killing; a second one ends the process.

    Only a process's main thread can take signals; in another the request is never set by them.
    """
    request = SharedStopRequest() if processes.are_joined() else StopRequest()
    with contextlib.closing(request):
        if threading.current_thread() is threading.main_thread():
            with _signals_to(request):
                yield request
        else:
            yield request


@contextlib.contextmanager
def _signals_to(request: StopRequest) -> Iterator[None]:
    # Python runs handlers between its own instructions, which a compilation of minutes holds up;
    # the number of a signal is in the pipe at once, and a thread waits there.
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    known = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    # What is ignored stays so: nohup and shells without job control ignore some on purpose.
    numbers = [number for number in known if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    before = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(receiving, numbers, request), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(sending)
        watcher.join()
        os.close(receiving)


def _watch(receiving: int, numbers: list[int], request: StopRequest) -> None:
    while data := os.read(receiving, 1):
        if data[0] not in numbers:  # a signal of somebody else's
            continue
        if request.was_asked():
            os._exit(exit_code(data[0]))
        request.set(data[0])
