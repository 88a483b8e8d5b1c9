"""Programs that tests run apart, since what they look at is read once in the life of a process."""

import functools
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

# Only what stands still takes so long; any of them takes minutes where others work beside it.
HANGS_S = 3600


def printed(command: Sequence[Any], **options: Any) -> str:
    """What a program printed; where it fails, the end of its complaint is the error."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=HANGS_S, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def once(function: Callable) -> Callable:
    """Calls a function once for all tests that ask for what it gives, also where it fails."""

    @functools.cache
    def outcome(*given):
        try:
            return function(*given), None
        except Exception as error:
            return None, error

    def remembered(*given):
        value, error = outcome(*given)
        if error is not None:
            raise error
        return value

    return remembered
