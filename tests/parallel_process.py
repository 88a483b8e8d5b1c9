"""One process of several that train the tiny run; a program of its own.

``python -m tests.parallel_process FLAGS`` is ``python -m experiments.state_tracking FLAGS`` with a
model that compiles at once; SCRIPT=language_modeling in the environment is that script. DIE_AT
there makes a process fail, as a bug would, behind that step; ASK_AT makes it say so, wait for a
line of its standard input, and go slowly. STEP_S is how long each step takes at least, HEARTBEAT_S
how soon the others of a dead one end, and JOIN_S how long they wait for one that does not come.
"""

import os
import sys
import time

import tiny_run

from deltaproduct_jax.parallel import processes
from deltaproduct_jax.training import loop
from deltaproduct_jax.training.stopping import SharedStopRequest
from experiments import language_modeling, state_tracking

SCRIPTS = {"state_tracking": state_tracking, "language_modeling": language_modeling}


def main() -> int:
    """Exit code of the command."""
    loop.SequenceModel = tiny_run.TinyModel
    for name, variable in (
        ("HEARTBEAT_TIMEOUT_S", "HEARTBEAT_S"),
        ("INITIALIZATION_TIMEOUT_S", "JOIN_S"),
    ):
        if variable in os.environ:
            setattr(processes, name, int(os.environ[variable]))
    step_s = float(os.environ.get("STEP_S", 0))
    reached = SharedStopRequest.reached

    def behind(self, step):
        if step == int(os.environ.get("DIE_AT", -1)):
            raise RuntimeError(f"made to fail behind step {step}")
        ask_at = int(os.environ.get("ASK_AT", sys.maxsize))
        if step == ask_at:
            print("waiting", flush=True)
            sys.stdin.readline()
        if step > ask_at:  # processes take a second to agree, which are many steps of this model
            time.sleep(0.1)
        time.sleep(step_s)
        return reached(self, step)

    SharedStopRequest.reached = behind
    return SCRIPTS[os.environ.get("SCRIPT", "state_tracking")].main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
