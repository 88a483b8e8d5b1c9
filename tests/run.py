"""The README's test command: ``python3 tests/run.py`` sets up ``.venv`` and runs pytest in it.

All tests that are not marked slow run; ``--slow`` runs the slow ones instead, and brings
lm-evaluation-harness (300 MB) and an emulated bucket (80 MB), which ``--extra=evaluation`` and
``--extra=gcs`` do alone. ``--extra=tpu`` adds the compiler for TPUs (package libtpu, 200 MB),
``--extra=gpu`` that of the GPU kernels (Triton, 200 MB), ``--extra=gluon`` a newer one for those in
Gluon; without them the tests that need them skip. The whole run is shared by two processes.
Anything else is passed on to pytest, which then is one process. Needs nothing but Python 3.11 or
newer.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.lib import environment

EXTRA = "--extra="


def main() -> int:
    """Runs pytest in the project's environment; returns its exit code."""
    import pytest

    arguments = sys.argv[1:]
    chosen = "slow" if "--slow" in arguments else "not slow"
    rest = [a for a in arguments if a != "--slow" and not a.startswith(EXTRA)]
    # By file, so that what a file's tests share is made once, in the order of conftest.py; two, as
    # CI has cores.
    split = ["-n2", "--dist=loadfile", "--no-loadscope-reorder"]
    shared = split if not rest and (os.cpu_count() or 1) > 1 else []
    return pytest.main(["-m", chosen, "--durations=10", *shared, *rest])


if __name__ == "__main__":
    extras = [a.removeprefix(EXTRA) for a in sys.argv[1:] if a.startswith(EXTRA)]
    if "--slow" in sys.argv[1:]:
        extras = list(dict.fromkeys([*extras, "evaluation", "gcs"]))
    if environment.inside(extras):
        sys.exit(main())
    environment.go_on_inside("tests.run", extras)
