"""Makes the project's virtual environment and goes on inside it; needs only the standard library.

Shared by the two commands of the README (``experiments/quickstart.py`` and ``tests/run.py``), which
must run on a machine that has nothing but Python.
"""

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from experiments import leave_on_interrupt

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
OLDEST_PYTHON = (3, 11)
STAMP = "requirements.sha256"
# Packages that stand beside the others, where only those who ask for them find them: with libtpu
# among the others, every program would look for a TPU and complain that there is none.
EXTRAS = {
    "tpu": "requirements-tpu.txt",
    "gpu": "requirements-gpu.txt",
    "cuda": "requirements-cuda.txt",
    "gluon": "requirements-gluon.txt",
    "evaluation": "requirements-evaluation.txt",
    "gcs": "requirements-gcs.txt",
}
# Those that the tests' own process shall find; Triton only a child finds, or every program of every
# test would hold a branch for GPUs.
ON_PATH = ("tpu", "evaluation")


def extra_folder(extra: str) -> Path:
    """Where the packages of an extra are, if it was ever asked for."""
    return VENV / "extras" / extra


def extra_requirement(extra: str) -> str:
    """What the extra installs."""
    lines = (ROOT / EXTRAS[extra]).read_text().splitlines()
    return " ".join(line for line in lines if not line.startswith("#"))


def inside(extras: Sequence[str] = ()) -> bool:
    """Whether this process runs in the project's environment already, with the extras."""
    return Path(sys.prefix).resolve() == VENV.resolve() and all(
        _is_filled(extra) and (extra not in ON_PATH or str(extra_folder(extra)) in sys.path)
        for extra in extras
    )


def _is_filled(extra: str) -> bool:
    stamp = extra_folder(extra) / STAMP
    return extra in EXTRAS and stamp.exists() and stamp.read_text() == _fingerprint(EXTRAS[extra])


def go_on_inside(module: str, extras: Sequence[str] = ()) -> NoReturn:
    """Sets the environment up where needed, then runs ``python -m module`` in it.

    The arguments of this process are passed on, and its exit code is this one's.

    Args:
        module: what to run, seen from the project's root.
        extras: of `EXTRAS`, which ``module`` needs too.
    """
    leave_on_interrupt()
    for extra in extras:
        if extra not in EXTRAS:
            _fail(f"--extra={extra} is not known; it may be one of {', '.join(EXTRAS)}")
    python = Path(sys.executable) if inside() else _set_up()
    variables = dict(os.environ)
    folders = {extra: str(_add(extra, python)) for extra in extras}
    path = [folders[extra] for extra in ON_PATH if extra in folders]
    path.append(os.environ.get("PYTHONPATH", ""))
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [str(python), "-m", module, *sys.argv[1:]]
    # On a terminal Ctrl-C reaches both; what runs inside says what becomes of it.
    signal.signal(signal.SIGINT, lambda *_: None)
    sys.exit(subprocess.call(command, cwd=ROOT, env=variables))


def _add(extra: str, python: Path) -> Path:
    """Fills the folder of an extra unless it holds these requirements; returns it."""
    folder, requirements = extra_folder(extra), ROOT / EXTRAS[extra]
    if not _is_filled(extra):
        print(f"Setting up {folder} (once) ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
        command = [str(python), "-m", "pip", "install", *options, "-r", str(requirements)]
        _run(command, f"the packages of {requirements.name}")
        (folder / STAMP).write_text(_fingerprint(EXTRAS[extra]))
    return folder


def _set_up() -> Path:
    """Creates and fills ``.venv`` unless it holds these requirements; returns its Python.

    A link is left as it is.
    """
    if sys.version_info[:2] < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        _fail(f"Python 3.11 or newer is needed, this is {found} ({sys.executable})")
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = VENV / STAMP
    wanted = _fingerprint("requirements.txt", "setup.cfg", "pyproject.toml")
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    if VENV.is_symlink():  # which would be emptied, for all who use it
        _fail(
            f"{VENV} is a link to {os.readlink(VENV)}, which does not hold what requirements.txt, "
            "setup.cfg and pyproject.toml here say; remove the link, and one is made here"
        )
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


def _fingerprint(*names: str) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _run(command: list[str], what: str) -> None:
    code = subprocess.call(command, cwd=ROOT)
    if code:
        _fail(f"installing {what} failed (exit code {code}); the lines above say why", code)


def _fail(text: str, code: int = 1) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)
