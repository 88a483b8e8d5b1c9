"""Makes the project's virtual environment and goes on inside it; needs only the standard library.

Shared by the two commands of the README (``experiments/quickstart.py`` and ``tests/run.py``), which
must run on a machine that has nothing but Python.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST_PYTHON = (3, 11)


def inside() -> bool:
    """Whether this process runs in the project's environment already."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def go_on_inside(module: str) -> NoReturn:
    """Sets the environment up where needed, then runs ``python -m module`` in it.

    The arguments of this process are passed on, and its exit code is this one's.

    Args:
        module: what to run, seen from the project's root.
    """
    python = _set_up()
    command = [str(python), "-m", module, *sys.argv[1:]]
    sys.exit(subprocess.call(command, cwd=ROOT))


def _set_up() -> Path:
    """Creates and fills ``.venv`` unless it holds these requirements; returns its Python."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        _fail(f"Python 3.11 or newer is needed, this is {found} ({sys.executable})")
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp, wanted = VENV / "requirements.sha256", _fingerprint()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    if importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        _fail(
            "this Python has no ensurepip, so it cannot make a virtual environment; on Debian and "
            f"Ubuntu install it with: apt-get install python{version}-venv"
        )
    print(f"Setting up {VENV} (once; a few minutes on a slow line) ...", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(VENV)], "the virtual environment")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "-r", str(ROOT / "requirements.txt")], "the packages of requirements.txt")
    _run([*pip, "--no-deps", "-e", str(ROOT)], "the project")
    stamp.write_text(wanted)
    return python


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for name in ("requirements.txt", "setup.cfg", "pyproject.toml"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _run(command: list[str], what: str) -> None:
    code = subprocess.call(command, cwd=ROOT)
    if code:
        _fail(f"installing {what} failed (exit code {code}); the lines above say why", code)


def _fail(text: str, code: int = 1) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)
