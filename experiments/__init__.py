"""One thin script per question; run as ``python -m experiments.NAME``."""

import os
import signal
import sys
from typing import Any

STARTING = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


def leave(number: int, *_: Any) -> None:
    """What a signal does while a script is being imported: nothing has begun, nothing is lost."""
    os.write(2, f"stopped by {STARTING[number]}; the same command begins anew\n".encode())
    os._exit(128 + number)


def leave_on_interrupt() -> None:
    """From now on Ctrl-C and SIGTERM, unless ignored, end the process at once, in one line."""
    for number in STARTING:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, leave)


def leave_no_more() -> None:
    """Both signals do again what they do in Python by itself."""
    for number in STARTING:
        if signal.getsignal(number) is leave:
            is_ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)


# JAX alone takes a second to import, and Python would show where in it the signal came. Python
# imports this before the script itself; the script's command then sees to signals of its own.
if sys.argv[:1] == ["-m"] and any(text.startswith("experiments.") for text in sys.orig_argv):
    leave_on_interrupt()
