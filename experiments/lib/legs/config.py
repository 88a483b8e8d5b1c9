"""How a leg is trained and measured, as flags of the commands that do so."""

import dataclasses
import math
from typing import Any

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.settings import check_fields, seed_setting, setting
from experiments.lib.legs.leg import LEGS, Leg, parts_of_leg, share_of_leg

STAGES = ("prepare", "train", "measure", "draw")
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": {
        "leg": "tiny",
        "tokens": 20_000,
        "train_length": 128,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "length": 512,
        "rank_length": 256,
        "rows": 2,
        "tokenizer": "bytes",
    },
}


@dataclasses.dataclass(frozen=True)
class LegConfig:
    """Which leg, how far, and what of it; raises ConfigError where the fields make no sense."""

    leg: str = setting("213m_2", f"one of {', '.join(LEGS)}", one_of=LEGS)
    stages: tuple[str, ...] = setting(
        STAGES, f"in turn, among {', '.join(STAGES)}", filled=True, one_of=STAGES
    )
    archive: str | None = setting(None, "of experiments.language.pack_text; none: already unpacked")
    tokenizer: str = setting("mistral", "as of experiments.prepare_text")
    tokens: int = setting(200_000_000, "trained on", least=1)
    train_length: int = setting(4096, "tokens of a row", least=1)
    batch_size: int = setting(32, "rows of an update", least=1)
    accumulation_steps: int | None = setting(
        None,
        "parts of a batch whose gradients are added in turn; none: 4 of legs of 213M parameters, "
        "whose activations take more memory, 1 of others",
        least=1,
    )
    learning_rate: float = setting(6e-4, "peak learning rate; it falls to a tenth", above=0)
    train_s: float | None = setting(
        None, "seconds of this start's training; none: to its end", above=0
    )
    length: int = setting(32768, "tokens of the rows measured", least=1)
    rank_length: int = setting(16384, "tokens of the row whose ranks are taken", least=1)
    rows: int = setting(16, "rows measured, of each text", least=1)
    seed: int = seed_setting("of parameters and data")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if self.batch_size % self.parts:
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of accumulation_steps="
                f"{self.accumulation_steps}"
            )
        if self.steps < 1:
            raise ConfigError(
                f"tokens={self.tokens} must be one batch of batch_size={self.batch_size} rows of "
                f"train_length={self.train_length} at least"
            )

    @property
    def parts(self) -> int:
        """Parts of a batch; the leg's own are as many as divide the batch."""
        if self.accumulation_steps is not None:
            return self.accumulation_steps
        return math.gcd(self.batch_size, parts_of_leg(self.leg))

    def share(self, leg: Leg) -> float:
        """Of an H200's memory, for training a leg by these settings."""
        return share_of_leg(leg.name, dataclasses.replace(self, leg=leg.name).parts)

    @property
    def steps(self) -> int:
        """Updates of the parameters."""
        return self.tokens // (self.batch_size * self.train_length)

    @property
    def tokens_trained(self) -> int:
        """Tokens of all updates, whole batches."""
        return self.steps * self.batch_size * self.train_length

    def training(self, leg: Leg) -> list[str]:
        """The command that trains a leg by these settings, but for "leg" and "seed"."""
        own = dataclasses.replace(self, leg=leg.name, seed=leg.seed)
        settings = (own.batch_size, own.parts, own.steps, own.learning_rate)
        return leg.training(own.train_length, *settings)

    def flags(self, **others: object) -> dict[str, object]:
        """What the command `experiments.language.paper` is given; ``others`` instead of fields."""
        fields = dataclasses.asdict(self) | others
        return {name: value for name, value in fields.items() if value is not None}
