"""The console script ``deltaproduct-lm-eval``: the harness's own command line, with our models.

deltaproduct-lm-eval run --model deltaproduct --model_args path=runs/text --tasks piqa
"""

import sys

from deltaproduct_jax.errors import ConfigError, RunDirectoryError, require_package

NAME = "deltaproduct"
CLASS = "deltaproduct_jax.evaluation.harness:DeltaProductLM"


def register() -> None:
    """Makes ``deltaproduct`` a model of the harness, whose releases up to 0.4.13 find none alone.

    Raises:
        ConfigError: the harness is not installed.
    """
    require_package("lm_eval", "evaluation", "evaluation")
    registry = require_package("lm_eval.api.registry", "evaluation", "evaluation").model_registry
    if NAME not in registry:
        registry.register(NAME, target=CLASS)


def main() -> int:
    """Hands the command line over; errors of the user's are one line."""
    try:
        register()
        require_package("lm_eval.__main__", "evaluation", "evaluation").cli_evaluate()
    except (ConfigError, RunDirectoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
