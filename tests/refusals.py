"""What a script says of arguments that it refuses."""

import importlib

import pytest

from deltaproduct_jax.errors import ConfigError, RunDirectoryError


def refusal(script, argv, errors=(ConfigError, RunDirectoryError)):
    """The text of the error in which a script of `experiments` ends."""
    module = importlib.import_module(f"experiments.{script}")
    command = getattr(module, "command", None) or module.EXPERIMENT.command
    with pytest.raises(errors) as caught:
        command(argv)
    return str(caught.value)
