"""A run does not outlive the process that began it: it saves and ends, however that ended."""

import os
import signal
import threading
import time
from collections.abc import Callable

VARIABLE = "EXPERIMENTS_SWEEP_PROCESS"  # of a run: the number of the process that began it
LOOK_EVERY_S = 0.5


def marked(variables: dict[str, str]) -> dict[str, str]:
    """The environment of a run that is to end with this process."""
    return variables | {VARIABLE: str(os.getpid())}


def end_with_parent(was_asked: Callable[[], bool] = lambda: False) -> None:
    """From here on the end of the sweep that began this process is a SIGTERM to it, if one did.

    One signal alone, since a second one would not let it save. Linux could send it by itself
    (``PR_SET_PDEATHSIG``), but does so for each thread of the sweep that happens to die first.

    Args:
        was_asked: whether this process has heard one, as of a sweep that was itself ended while it
            waited for its runs to save.
    """
    parent = os.environ.pop(VARIABLE, None)  # what this process begins has it as its parent
    if parent is None:
        return
    if os.getppid() != int(parent):  # it has ended already
        _tell()
    else:
        threading.Thread(target=_watch, args=(int(parent), was_asked), daemon=True).start()


def _watch(parent: int, was_asked: Callable[[], bool]) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    if not was_asked():
        _tell()


def _tell() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
