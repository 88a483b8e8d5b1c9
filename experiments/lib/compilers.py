"""Packages that hold the compilers for chips, which need not be there: versions, how to get one."""

import importlib.metadata
import sys

import jax

from deltaproduct_jax.errors import ConfigError
from experiments.lib import environment

# By platform, which also names the extra of .venv that holds it; and what it compiles for.
PACKAGES = {"tpu": ("libtpu", "TPUs"), "cuda": ("jax-cuda13-pjrt", "GPUs")}


def compiler_version(platform: str) -> str | None:
    """Of a compiler in this environment, or in the extra of ``.venv``; None where it is missing."""
    path = [*sys.path, str(environment.extra_folder(platform))]
    found = importlib.metadata.distributions(name=PACKAGES[platform][0], path=path)
    return next((distribution.version for distribution in found), None)


def require_compiler(platform: str) -> None:
    """Raises ConfigError, saying how to get it, where a compiler is not installed."""
    if compiler_version(platform) is None:
        package, chips = PACKAGES[platform]
        raise ConfigError(
            f"package {package}, which holds the compiler for {chips}, is not installed; install "
            f"it with pip install {environment.extra_requirement(platform)}, or as an extra of "
            f".venv with python3 tests/run.py --extra={platform}"
        )


def versions(platform: str) -> str:
    """Of JAX and of a compiler, for the record."""
    return f"jax {jax.__version__}, {PACKAGES[platform][0]} {compiler_version(platform)}"
