"""The console script ``deltaproduct-lm-eval``: the harness's own command line, with our models.

deltaproduct-lm-eval run --model deltaproduct --model_args path=runs/text --tasks piqa
"""

import sys

from deltaproduct_jax.data.optional import require
from deltaproduct_jax.errors import ConfigError, RunDirectoryError

NAME = "deltaproduct"
CLASS = "deltaproduct_jax.evaluation.harness:DeltaProductLM"


def register() -> None:
    """Makes ``deltaproduct`` a model of the harness, whose releases up to 0.4.13 find none alone.

    Raises:
        ConfigError: the harness is not installed.
    """
    require("lm_eval", "evaluation", extra="evaluation")
    registry = require("lm_eval.api.registry", "evaluation", extra="evaluation").model_registry
    if NAME not in registry:
        registry.register(NAME, target=CLASS)


def main() -> int:
    """Hands the command line over; errors of the user's are one line."""
    try:
        register()
        require("lm_eval.__main__", "evaluation", extra="evaluation").cli_evaluate()
    except (ConfigError, RunDirectoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
