"""Packages that only some work needs: imported where they are used, named where missing."""

import importlib
from types import ModuleType

from deltaproduct_jax.errors import ConfigError


def require(package: str, what: str, extra: str = "data") -> ModuleType:
    """The module ``package``, or one line that says what it is for and how to install it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        root = package.partition(".")[0]
        if (error.name or "").partition(".")[0] != root:
            raise  # it is there, and something that it needs itself is not
        raise ConfigError(
            f"{what} needs the package {root}; pip install 'deltaproduct_jax[{extra}]' installs it"
        ) from error
