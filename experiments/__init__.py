"""One thin script per question; run as ``python -m experiments.NAME``."""

import os
import signal
import sys
from typing import Any


def leave(*_: Any) -> None:
    """What Ctrl-C does while a script is being imported: nothing has begun, so nothing is lost."""
    os.write(2, b"stopped by Ctrl-C; the same command begins anew\n")
    os._exit(128 + signal.SIGINT)


def leave_on_interrupt() -> None:
    """From now on Ctrl-C, unless it is ignored, ends the process at once, in one line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


# JAX alone takes a second to import, and Python would show where in it the signal came. Python
# imports this before the script itself; the script's command then sees to signals of its own.
if sys.argv[:1] == ["-m"] and any(text.startswith("experiments.") for text in sys.orig_argv):
    leave_on_interrupt()
