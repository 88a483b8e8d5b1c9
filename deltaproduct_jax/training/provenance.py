"""Where a run comes from: command, commit, versions, devices."""

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("deltaproduct_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe_start(
    argv: Sequence[str],
    seeds: dict[str, int],
    resumed_from: int | None,
    mesh: Mapping[str, int],
    began: float,
) -> dict[str, Any]:
    """One entry of run.json; ``began`` is when, in seconds since 1970."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "argv": list(argv),
        "resumed_from": resumed_from,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _dirty(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "mesh": dict(mesh),
        "seeds": seeds,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a folder that was never installed


def _dirty() -> bool | None:
    status = _git("status", "--porcelain")
    return None if status is None else bool(status)


def _git(*command: str) -> str | None:
    """What git says of the repository that tracks this file; None without git or without one."""
    here = Path(__file__)
    try:
        for arguments in (("ls-files", "--error-unmatch", here.name), command):
            # A look must not take the repository's lock, which a killed process would leave behind.
            git = ["git", "--no-optional-locks", "-C", str(here.parent)]
            done = subprocess.run([*git, *arguments], capture_output=True, text=True)
            if done.returncode:
                return None
    except FileNotFoundError:
        return None
    return done.stdout.strip()
