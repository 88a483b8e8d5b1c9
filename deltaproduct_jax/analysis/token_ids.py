"""What analyses are asked to read: ids that the model has. Indexing would take any number."""

from typing import Any

import numpy as np

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import SequenceModel


def token_ids(name: str, ids: Any, layout: str, model: SequenceModel) -> np.ndarray:
    """The ids as int32.

    Args:
        name: of the argument, for errors.
        ids: what was given.
        layout: its dimensions, such as ``"N T"``.
        model: whose ids they are to be.

    Raises:
        ConfigError: they are no whole numbers of that layout, none, or of another vocabulary.
    """
    return numbers_below(name, ids, layout, model.config.vocab_size, "the model has ids")


def numbers_below(name: str, given: Any, layout: str, limit: int, has: str) -> np.ndarray:
    """Whole numbers from 0 and below ``limit`` as int32; ConfigError, as `token_ids`, of others.

    Args:
        name, given, layout: as of `token_ids`.
        limit: how many there are.
        has: of what, to stand before them in the error.
    """
    found, letters = np.asarray(given), layout.split()
    if found.ndim != len(letters) or not found.size or not np.issubdtype(found.dtype, np.integer):
        raise ConfigError(
            f"{name} must be whole numbers [{', '.join(letters)}], one at least, got "
            f"{found.dtype.name} of shape {found.shape}"
        )
    least, most = int(found.min()), int(found.max())
    if least < 0 or most >= limit:
        raise ConfigError(f"{name} hold {least} to {most}; {has} 0 to {limit - 1}")
    return found.astype(np.int32)
