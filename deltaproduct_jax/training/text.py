"""Text as what a run learns: the next token of streams that are read from disk.

Dimension key: ``B`` rows of a batch, ``T`` positions.
"""

import dataclasses
from typing import Any

from deltaproduct_jax.data.config import StreamConfig
from deltaproduct_jax.data.stream import TokenStream, open_corpora
from deltaproduct_jax.errors import require_ascending, require_at_least
from deltaproduct_jax.settings import setting
from deltaproduct_jax.tasks.registry import register_task
from deltaproduct_jax.tasks.task import Metric


@dataclasses.dataclass(frozen=True)
class TextTask(StreamConfig):
    """Next tokens of text; in the place of a task, with a stream where tasks have a key.

    Raises:
        ConfigError: a field makes no sense.
    """

    train_length: int = setting(256, "tokens of a row that is trained on")
    eval_lengths: tuple[int, ...] = setting((256,), "tokens of the rows evaluated, ascending")

    answers_every_token = True
    selected_by = (Metric("valid_loss", larger_is_better=False),)

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        self.check_length("train_length", self.train_length)
        require_ascending("eval_lengths", self.eval_lengths)
        self.check_length("eval_lengths", self.eval_lengths[0])

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """Lengths at which a run is evaluated, ascending."""
        return self.eval_lengths

    @property
    def vocab_size(self) -> int:
        """Token ids of the text's tokenizer, for which its folders are looked at."""
        return open_corpora(self, "train")[0].vocab_size

    def check_length(self, name: str, length: int) -> None:
        """Raises ConfigError, naming the field, if there is no row of ``length``."""
        require_at_least(name, length, 1)

    def stream(self, split: str, **options: Any) -> TokenStream:
        """Rows of a split; ``options`` are the stream's own."""
        names = [field.name for field in dataclasses.fields(StreamConfig)]
        config = StreamConfig(**{name: getattr(self, name) for name in names})
        return TokenStream(config, split, **options)


register_task("text", TextTask)
