"""What a task draws is a matter of its key, not of the settings of JAX."""

import jax
import numpy as np
import pytest
from quick import quick

from deltaproduct_jax.tasks.formal_languages import LANGUAGES, FormalLanguageTask
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.tasks.recall import RecallTask

TASKS = [GroupTask("S3"), RecallTask(16, 2, vocabulary=64, filler="random")]
TASKS += [FormalLanguageTask(language) for language in LANGUAGES]
SLOW = FormalLanguageTask("modular_arithmetic")  # draws as that with brackets does


@pytest.mark.parametrize(
    "task",
    quick(TASKS, [t for t in TASKS if t != SLOW]),
    ids=lambda task: getattr(task, "language", None),
)
def test_a_batch_is_the_same_with_numbers_of_64_bits_and_strict_promotion(task):
    drawn = []
    for wide, promotion in ((False, "standard"), (True, "strict")):
        with jax.enable_x64(wide), jax.numpy_dtype_promotion(promotion):
            batch = jax.jit(task.batch, static_argnums=(1, 2))(jax.random.key(0), 8, 16)
            drawn.append([np.asarray(array) for array in batch if array is not None])
    for a, b in zip(*drawn, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
