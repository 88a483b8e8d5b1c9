"""The tokenizer that a run's text was made with."""

from deltaproduct_jax.data import standard_library
from deltaproduct_jax.data.tokenizer import ByteTokenizer, Tokenizer, tokenizer_of
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import user_path
from deltaproduct_jax.training.config import RunConfig


def tokenizer_of_run(config: RunConfig) -> Tokenizer:
    """The tokenizer of the folders that a run was trained on; all of them have one.

    Raises:
        ConfigError: the run was trained on no text, or what reads its tokenizer is not installed.
        RunDirectoryError: the folder with the tokenizer is not there any more.
    """
    data = getattr(config.task, "data", None)
    if not data:
        kind = type(config.task).__name__
        raise ConfigError(f"run has the task {kind}; it must be one that was trained on text")
    if data[0] == standard_library.NAME:
        return ByteTokenizer()
    return tokenizer_of(user_path(data[0]))
