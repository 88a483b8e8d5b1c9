"""Calls a function on one entry after another in a child process, which a compiler may abort.

``python -m deltaproduct_jax.compilers.child MODULE:FUNCTION`` reads a JSON list from standard input
and prints what the function makes of each entry, a line of JSON each, as soon as it is made.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "deltaproduct_jax.compilers.child")


def call_apart(
    function: str,
    entries: Sequence[Any],
    *,
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float,
) -> tuple[list[Any], str | None]:
    """Calls a function on every entry in one child process.

    Args:
      function: "module:name", of one argument; it and what it gives are JSON.
      entries: the arguments.
      folder: where the child runs, and from where it imports.
      environment: of the child.
      timeout_s: seconds for all of them, after which the child is ended.

    Returns:
      What the function gave, up to the entry that ended the child or was cut off; and how it ended:
      None after the last entry, "timed out" or "aborted".

    Raises:
      RuntimeError: the child failed in Python, which no compiler does.
    """
    child = subprocess.Popen(
        [*COMMAND, function],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    is_late = False
    try:
        out, complaint = child.communicate(json.dumps(entries), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        is_late = True
        child.kill()
        out, complaint = child.communicate()
    except BaseException:  # a signal to this process, which may not have reached that one
        child.kill()
        child.wait()
        raise
    if child.returncode > 0:
        raise RuntimeError(f"{function} failed on {entries}:\n{complaint[-3000:]}")
    # The last line may be half a line.
    results = [json.loads(line) for line in out.split("\n")[:-1]]
    is_short = len(results) < len(entries)
    return results, ("timed out" if is_late else "aborted") if is_short else None


def main(argv: Sequence[str]) -> None:
    """The child: calls the function that ``argv`` names on what standard input holds."""
    module, _, name = argv[0].partition(":")
    function = getattr(importlib.import_module(module), name)
    for entry in json.load(sys.stdin):
        print(json.dumps(function(entry)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
