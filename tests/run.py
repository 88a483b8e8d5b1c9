"""The README's test command: ``python3 tests/run.py`` sets up ``.venv`` and runs pytest in it.

All tests that are not marked slow run; ``--slow`` runs the slow ones instead, and anything else is
passed on to pytest. Needs nothing but Python 3.11 or newer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import environment


def main() -> int:
    """Runs pytest in the project's environment; returns its exit code."""
    import pytest

    arguments = sys.argv[1:]
    chosen = "slow" if "--slow" in arguments else "not slow"
    rest = [argument for argument in arguments if argument != "--slow"]
    return pytest.main(["-m", chosen, "--durations=10", *rest])


if __name__ == "__main__":
    if environment.inside():
        sys.exit(main())
    environment.go_on_inside("tests.run")
