"""A run does not outlive the sweep that began it: it saves and ends, however the sweep ended.

Linux tells a process of its parent's death; elsewhere a run goes on alone after ``kill -9`` of its
sweep, which the next sweep in the folder then waits for.
"""

import ctypes
import os
import signal
import sys

VARIABLE = "EXPERIMENTS_SWEEP_PROCESS"  # of a run: the number of the process that began it
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def marked(variables: dict[str, str]) -> dict[str, str]:
    """The environment of a run that is to end with this process."""
    return variables | {VARIABLE: str(os.getpid())}


def end_with_parent() -> None:
    """From here on the end of the sweep that began this process is a SIGTERM to it, if one did."""
    parent = os.environ.pop(VARIABLE, None)  # what this process begins has it as its parent
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != int(parent):  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)
