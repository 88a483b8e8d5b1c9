"""Which training steps are timed: the fields that are flags, presets, and models one by one."""

import dataclasses
from typing import Any

import numpy as np

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.config import TrainConfig
from experiments.lib.bench.peers.fla_model import PRECISIONS
from experiments.lib.bench.training_steps import ALONE

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "small": {
        "batch_size": (2,),
        "length": (64,),
        "vocab_size": 256,
        "hidden_size": (64,),
        "num_layers": 2,
        "num_heads": (4, 2),
        "head_dim": 16,
        "intermediate_size": (128,),
        "repeats": 3,
    },
    "narrow": {
        "batch_size": (4096,),
        "length": (129,),
        "vocab_size": 127,
        "hidden_size": (128,),
        "num_layers": 1,
        "num_householder": (4,),
        "num_heads": (8,),
        "head_dim": 32,
        "intermediate_size": (512,),
        "use_short_conv": False,
        "tie_embeddings": False,
        "remat": ("none",),
    },
    "gpu": {
        "num_householder": (1, 2, 3, 1, 2, 3, 2),
        "num_heads": (8, 4, 4, 8, 4, 4, 12),
        "gated": (0, 0, 0, 1, 1, 1, 0),
        "hidden_size": (*6 * (1024,), 2048),
        "intermediate_size": (*6 * (2816,), 5632),
        "remat": (*6 * ("none",), "products"),
        "peer": "fla",
        "peer_precisions": "masters",
        "repeats": 4,
        "budget_s": 6.0,
        "gpus": 2,
        "at_once": 2,
    },
    "meshes": {
        "num_householder": (2, 2),
        "num_heads": (4, 4),
        "batch_size": (8, 1),
        "length": (4096, 131072),
        "remat": ("none", "blocks"),
        "meshes": "data:1;data:2;fsdp:2;tensor:2 | data:1;sequence:2",
        "repeats": 4,
        "budget_s": 6.0,
        "at_once": 2,
    },
}
# What there is one of for all models, or one for each.
FOR_EACH = ("batch_size", "length", "hidden_size", "intermediate_size", "gated", "remat")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What is timed."""

    batch_size: tuple[int, ...] = setting(
        (8,), "sequences B, of each device along data and fsdp", least=1
    )
    length: tuple[int, ...] = setting((4096,), "tokens T", least=1)
    vocab_size: int = setting(32000, "number of token ids")
    hidden_size: tuple[int, ...] = setting((1024,), "width D of the residual stream", least=1)
    num_layers: int = setting(24, "number of blocks")
    num_householder: tuple[int, ...] = setting((1, 2), "Householder factors per token, in turn")
    num_heads: tuple[int, ...] = setting((8, 4), "heads H, a number for each num_householder")
    head_dim: int = setting(128, "key width K and value width V")
    intermediate_size: tuple[int, ...] = setting(
        (2816,), "width of the SwiGLU's hidden layer", least=1
    )
    gated: tuple[int, ...] = setting((0,), "1: with a forget gate; 0: without", one_of=(0, 1))
    use_short_conv: bool = setting(True, "convolutions over 4 tokens on q, k and v")
    tie_embeddings: bool = setting(True, "one matrix for embedding and head")
    dtype: str = setting("bfloat16", "dtype of our computation; parameters are float32")
    remat: tuple[str, ...] = setting(
        ("products",), "what our blocks compute anew: none, products or blocks"
    )
    implementation: str | None = setting(None, "of our op; none: by platform and shape")
    conv_implementation: str | None = setting(
        None, "of our convolutions, plain or triton; none: by platform and shape"
    )
    meshes: str = setting(
        ALONE,
        "devices of our model as --mesh of training has them, in turn, a semicolon between; where "
        "they are others for each model, | between lists",
    )
    steps: int = setting(4, "steps per timed round", least=1)
    repeats: int = setting(6, "timed rounds, after one that warms up", least=1)
    budget_s: float = setting(
        30.0, "seconds after which no further round of a model begins", above=0
    )
    gpus: int = setting(1, "GPUs that models of one device are shared out to", least=1)
    at_once: int = setting(
        1, "our models under way on a GPU, of which one is compiled and timed", least=1
    )
    peer: str | None = setting(
        None, "fla: flash-linear-attention's model too, on a GPU", one_of=("fla",)
    )
    peer_precisions: str = setting(
        ",".join(PRECISIONS),
        "comma list for the peer: masters (bfloat16 parameters and float32 copies that AdamW "
        "updates), autocast (float32 parameters), bfloat16 (parameters and AdamW alike)",
    )

    def __post_init__(self) -> None:
        """Checks every field; the model's are the model's to check."""
        check_fields(self)
        number = len(self.num_householder)
        if len(self.num_heads) != number or not number:
            raise ConfigError(
                f"num_heads={self.num_heads} must have a number for each of "
                f"num_householder={self.num_householder}, one at least"
            )
        for name in FOR_EACH:
            values = getattr(self, name)
            if len(values) not in (1, number):
                raise ConfigError(
                    f"{name}={values} must have one number, or one for each of "
                    f"num_householder={self.num_householder}"
                )
        for precision in self.peer_precisions.split(","):
            require_one_of("peer_precisions", precision, PRECISIONS)
        if len(self.meshes.split("|")) not in (1, number):
            raise ConfigError(
                f"meshes={self.meshes!r} must have one list, or | between one for each of "
                f"num_householder={self.num_householder}"
            )
        for mesh in [mesh for model in self.models for mesh in model.meshes]:
            if -1 in DeviceConfig(mesh=mesh).sizes().values():
                raise ConfigError(f"meshes={self.meshes!r} must give sizes; {mesh!r} has -1")
        for model in self.models:
            self.model(model)
        if self.peer and self.meshes != ALONE:
            raise ConfigError(f"peer={self.peer!r} runs on one device: give meshes={ALONE!r}")
        if self.gpus > 1 and self.meshes != ALONE:
            raise ConfigError(f"gpus={self.gpus} shares out models of one device: give it 1")

    @property
    def models(self) -> list["Model"]:
        """Those that are timed, in turn."""
        number = len(self.num_householder)
        each = {name: getattr(self, name) for name in FOR_EACH}
        each = {name: x if len(x) == number else x * number for name, x in each.items()}
        lists = [tuple(x.strip().split(";")) for x in self.meshes.split("|")]
        lists = lists if len(lists) == number else lists * number
        factors = zip(self.num_householder, self.num_heads, lists, strict=True)
        return [
            Model(*of_model, **{name: x[place] for name, x in each.items()})
            for place, of_model in enumerate(factors)
        ]

    def model(self, model: "Model") -> ModelConfig:
        """Ours; with ``initializer="fla"`` it starts as the peer's does."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            mixer="gated_delta_product" if model.gated else "delta_product",
            hidden_size=model.hidden_size,
            num_layers=self.num_layers,
            num_heads=model.num_heads,
            head_dim=self.head_dim,
            expand_v=1.0,
            num_householder=model.num_householder,
            allow_neg_eigval=True,
            qk_activation="silu",
            use_output_gate=False,
            use_short_conv=self.use_short_conv,
            conv_size=4 if self.use_short_conv else None,
            norm_eps=1e-6,
            intermediate_size=model.intermediate_size,
            tie_embeddings=self.tie_embeddings,
            initializer="fla",
            initializer_range=0.006,
            dtype=self.dtype,
            remat=model.remat,
            implementation=self.implementation,
            conv_implementation=self.conv_implementation,
        )

    def tokens(self, model: "Model", mesh: str = ALONE) -> np.ndarray:
        """``[rows, T + 1]`` of a step over a mesh, the same in every process.

        As frequent as words are, by Zipf's law: an embedding's gradient adds what meets in a row.
        """
        frequencies = 1 / np.arange(1, self.vocab_size + 1)
        shape, chances = (model.rows(mesh), model.length + 1), frequencies / frequencies.sum()
        found = np.random.default_rng(0).choice(self.vocab_size, size=shape, p=chances)
        return found.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the models, by the fields of `StepConfig`."""

    num_householder: int
    num_heads: int
    meshes: tuple[str, ...]
    batch_size: int
    length: int
    hidden_size: int
    intermediate_size: int
    gated: int
    remat: str

    @property
    def training(self) -> TrainConfig:
        """The paper's optimiser, past its warm-up."""
        return TrainConfig(
            batch_size=self.batch_size,
            learning_rate=3e-4,
            schedule="constant",
            weight_decay=0.01,
            adam_b2=0.95,
            clip_norm=1.0,
        )

    def rows(self, mesh: str) -> int:
        """Sequences of a step over a mesh."""
        sizes = DeviceConfig(mesh=mesh).sizes()
        return self.batch_size * sizes["data"] * sizes["fsdp"]
