"""How fast does a 340M-parameter language model train: tokens per second of whole training steps.

    python -m experiments.op.step_speed --workdir=runs/step                  # a GPU of 80 GB
    python -m experiments.op.step_speed --workdir=runs/step --peer=fla       # beside the peer
    python -m experiments.op.step_speed --workdir=runs/step --preset=narrow  # a GPU of 24 GB
    python -m experiments.op.step_speed --workdir=runs/step --preset=small   # a CPU, to see it run
    python -m experiments.op.step_speed --workdir=runs/step --meshes="data:1;data:2;fsdp:2"

The shapes are the published ones of the paper's language models, with tied embeddings and
convolutions: 8 heads of 128 with one factor per token (341,594,112 parameters), 4 with two
(316,379,136). A step is the project's own: cross entropy of the next token, gradient, clipping,
AdamW, in bfloat16 with float32 parameters. ``--peer=fla`` trains the same model as
flash-linear-attention has it, in PyTorch. Tokens are drawn at random and stay the same.

Each model runs in a process of its own, one after another, because neither library gives back the
memory of a GPU that it has once taken. What a peer refuses becomes a line of the table.

``--preset=narrow`` is the model of ``--preset=paper`` of `experiments.state_tracking`: one layer of
128 channels, 8 heads of 32, n_h = 4, rows of 129 tokens, 4096 at a time. Of that run it leaves out
how a step makes its data.

``--meshes`` trains our model over several devices, as ``--mesh`` of the training scripts does,
mesh by mesh. Along data and fsdp each device has ``batch_size`` sequences of its own, so that
"of the first" is tokens per second of a device beside those with the first mesh (weak scaling).

On a GPU "on the GPU" is the time of our kernels alone, by JAX's profiler, without the host, and a
second table has the ten kinds of kernels that take longest; step.json has them all. MFU is the part
of the chip's peak as training reports it: 6 operations a parameter and token, whatever the model
computes anew. "GiB moved" is what all operations read and write, as XLA counts it.

Source: https://arxiv.org/abs/2502.10297, language models (340M, and n_h = 2 with half the heads).
Expect: experiments/results/gpu/step/ has an H200's, results/gpu/meshes/ those of two.
Takes: on a GPU of 80 GB 3 minutes with n_h = 1 and 5 with 2; with ``--preset=small`` seconds
    on a CPU.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.config import TrainConfig
from experiments.lib import flags
from experiments.lib.bench import training_steps
from experiments.lib.bench.peers.fla_model import PRECISIONS, check_peer, peer_rows
from experiments.lib.bench.report import (
    TIMES,
    begun,
    known_columns,
    markdown,
    shown,
    times,
    write_report,
)
from experiments.lib.bench.training_steps import ALONE, OURS, Row, measured, our_rows

PRESETS = {
    "default": {},
    "small": {
        "batch_size": 2,
        "length": 64,
        "vocab_size": 256,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": (4, 2),
        "head_dim": 16,
        "intermediate_size": 128,
        "repeats": 3,
    },
    "narrow": {
        "batch_size": 4096,
        "length": 129,
        "vocab_size": 127,
        "hidden_size": 128,
        "num_layers": 1,
        "num_householder": (4,),
        "num_heads": (8,),
        "head_dim": 32,
        "intermediate_size": 512,
        "use_short_conv": False,
        "tie_embeddings": False,
        "remat": "none",
    },
}
SHOWN_KERNELS = 10


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What is timed."""

    batch_size: int = setting(8, "sequences B, of each device along data and fsdp")
    length: int = setting(4096, "tokens T")
    vocab_size: int = setting(32000, "number of token ids")
    hidden_size: int = setting(1024, "width D of the residual stream")
    num_layers: int = setting(24, "number of blocks")
    num_householder: tuple[int, ...] = setting((1, 2), "Householder factors per token, in turn")
    num_heads: tuple[int, ...] = setting((8, 4), "heads H, a number for each num_householder")
    head_dim: int = setting(128, "key width K and value width V")
    intermediate_size: int = setting(2816, "width of the SwiGLU's hidden layer")
    gated: bool = setting(False, "with a forget gate")
    use_short_conv: bool = setting(True, "convolutions over 4 tokens on q, k and v")
    tie_embeddings: bool = setting(True, "one matrix for embedding and head")
    dtype: str = setting("bfloat16", "dtype of our computation; parameters are float32")
    remat: str = setting("products", "what our blocks compute anew: none, products or blocks")
    implementation: str | None = setting(None, "of our op; none: by platform and shape")
    conv_implementation: str | None = setting(
        None, "of our convolutions, plain or triton; none: by platform and shape"
    )
    meshes: str = setting(
        ALONE, "devices of our model as --mesh of training has them, in turn, a semicolon between"
    )
    steps: int = setting(4, "steps per timed round")
    repeats: int = setting(6, "timed rounds, after one that warms up")
    budget_s: float = setting(
        30.0, "seconds after which no further round of a model begins", above=0
    )
    peer: str | None = setting(None, "fla: flash-linear-attention's model too, on a GPU")
    peer_precisions: str = setting(
        ",".join(PRECISIONS),
        "comma list for the peer: masters (bfloat16 parameters and float32 copies that AdamW "
        "updates), autocast (float32 parameters), bfloat16 (parameters and AdamW alike)",
    )

    def __post_init__(self) -> None:
        """Checks every field; the model's are the model's to check."""
        check_fields(self)
        for name in ("batch_size", "length", "steps", "repeats"):
            require_at_least(name, getattr(self, name), 1)
        if len(self.num_heads) != len(self.num_householder) or not self.num_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} must have a number for each of "
                f"num_householder={self.num_householder}, one at least"
            )
        require_one_of("peer", self.peer, [None, "fla"])
        for precision in self.peer_precisions.split(","):
            require_one_of("peer_precisions", precision, PRECISIONS)
        for num_householder, num_heads in self.models:
            self.model(num_householder, num_heads)
        for mesh in self.meshes.split(";"):
            if -1 in DeviceConfig(mesh=mesh).sizes().values():
                raise ConfigError(f"meshes={self.meshes!r} must give sizes; {mesh!r} has -1")
        if self.peer and self.meshes != ALONE:
            raise ConfigError(f"peer={self.peer!r} runs on one device: give meshes={ALONE!r}")

    @property
    def models(self) -> list[tuple[int, int]]:
        """Factors per token and heads of each model."""
        return list(zip(self.num_householder, self.num_heads, strict=True))

    def model(self, num_householder: int, num_heads: int) -> ModelConfig:
        """Our model; with ``initializer="fla"`` it starts as the peer's does."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            mixer="gated_delta_product" if self.gated else "delta_product",
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=num_heads,
            head_dim=self.head_dim,
            expand_v=1.0,
            num_householder=num_householder,
            allow_neg_eigval=True,
            qk_activation="silu",
            use_output_gate=False,
            use_short_conv=self.use_short_conv,
            conv_size=4 if self.use_short_conv else None,
            norm_eps=1e-6,
            intermediate_size=self.intermediate_size,
            tie_embeddings=self.tie_embeddings,
            initializer="fla",
            initializer_range=0.006,
            dtype=self.dtype,
            remat=self.remat,
            implementation=self.implementation,
            conv_implementation=self.conv_implementation,
        )

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

    def tokens(self, mesh: str = ALONE) -> np.ndarray:
        """``[rows(mesh), T + 1]``, the same in every process.

        As frequent as words are, by Zipf's law: an embedding's gradient adds what meets in a row.
        """
        frequencies = 1 / np.arange(1, self.vocab_size + 1)
        shape, chances = (self.rows(mesh), self.length + 1), frequencies / frequencies.sum()
        found = np.random.default_rng(0).choice(self.vocab_size, size=shape, p=chances)
        return found.astype(np.int32)


def measure(config: StepConfig, num_householder: int, num_heads: int) -> Iterator[list[Row]]:
    """The rows of one shape: ours over each mesh, then the peer's."""
    model_config = config.model(num_householder, num_heads)
    timing = (config.steps, config.repeats, config.budget_s)
    known = {"num_householder": num_householder, "num_heads": num_heads}
    first: Row = {}
    for mesh in config.meshes.split(";"):
        tokens = config.tokens(mesh)
        rows = measured(our_rows, OURS, config.training, model_config, tokens, *timing, mesh)
        first = first or rows[0]
        yield _completed(rows, config, known | {"mesh": mesh}, first)
    if config.peer:
        precisions = config.peer_precisions.split(",")
        arguments = (config.training, model_config, precisions)
        rows = measured(peer_rows, config.peer, *arguments, config.tokens(), *timing)
        yield _completed(rows, config, known | {"mesh": ALONE}, first)


def _completed(rows: list[Row], config: StepConfig, known: Row, first: Row) -> list[Row]:
    """The rows with their shape, tokens per second, and these beside the first row's."""
    for row in rows:
        row |= known
        if "error" in row:
            continue
        tokens = config.rows(row["mesh"]) * config.length
        row["tokens_per_s"] = 1e3 * tokens / row["median_ms"]
        devices = row.setdefault("devices", 1)
        row["ours_times_faster"] = row["of_the_first"] = None
        if "error" not in first:
            per_device = row["tokens_per_s"] / devices
            of_the_first = per_device * first["devices"] / first["tokens_per_s"]
            ours = row["implementation"] == OURS
            row["of_the_first" if ours else "ours_times_faster"] = (
                of_the_first if ours else 1 / of_the_first
            )
    return rows


HEAD = ("n_h", "heads", "model", "mesh", "parameters", *TIMES, "on the GPU, ms", "tokens/s", "MFU")
HEAD += (
    "of the first",
    "ours x faster",
    "compile s",
    "GiB moved",
    "temp GiB",
    "peak GiB",
    "first loss",
)
HEAD += ("last loss",)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, and below it what did not run."""
    lines, failed = [], []
    for row in rows:
        names = [row["num_householder"], row["num_heads"], row["implementation"], row.get("mesh")]
        if "error" in row:
            lines.append([*names, *[None] * (len(HEAD) - len(names))])
            failed.append(
                f"n_h = {names[0]}, {names[2]} over {names[3]} did not run: {row['error']}"
            )
            continue
        # A peer has no more than its times.
        in_gib = ("moved_mib", "temp_mib", "peak_mib")
        memory = [row.get(name) and row[name] / 1024 for name in in_gib]
        lines.append(
            [
                *(
                    *names,
                    f"{row['parameters']:,}",
                    *times(row),
                    shown(row.get("device_ms"), ".4g"),
                ),
                *(f"{row['tokens_per_s']:,.0f}", shown(row.get("mfu"), ".1%")),
                *(shown(row.get(name), ".2f") for name in ("of_the_first", "ours_times_faster")),
                f"{row['compile_s']:.1f}",
                *(shown(gib, ".2f") for gib in memory),
                *(f"{row[name]:.3f}" for name in ("first_loss", "last_loss")),
            ]
        )
    return "\n\n".join([known_columns(HEAD, lines), *failed, *table_of_kernels(rows)])


def table_of_kernels(rows: Sequence[Row]) -> list[str]:
    """The kinds of kernels that take longest, if any were seen."""
    lines = [
        [row["num_householder"], f"`{kind}`", f"{milliseconds:.3g}"]
        for row in rows
        for kind, milliseconds in list(row.get("kernels_ms", {}).items())[:SHOWN_KERNELS]
    ]
    return [markdown(("n_h", "kernels", "ms"), lines)] if lines else []


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes step.json and step.md."""
    parsed = flags.parse(argv, {"step": StepConfig}, PRESETS)
    config = StepConfig(**parsed.sections["step"])
    if config.peer:
        training_steps.apart(check_peer)  # before minutes are spent
    record = begun("op.step_speed", argv, config=dataclasses.asdict(config), rows=[])
    for num_householder, num_heads in config.models:
        for rows in measure(config, num_householder, num_heads):
            print(table(rows), file=sys.stderr)
            record["rows"] += rows
            # What is measured stays, whatever comes next.
            text = write_report(parsed.workdir, "step", record, page)
    print(text)
    failed = [r for r in record["rows"] if "error" in r and r["implementation"] == OURS]
    if failed:
        raise ConfigError(f"our own model did not run: {failed[0]['error']}")


def page(record: Mapping[str, Any]) -> list[str]:
    """What step.md holds."""
    config = record["config"]
    machines = dict.fromkeys(row["machine"] for row in record["rows"] if "machine" in row)
    head = (
        f"B={config['batch_size']} T={config['length']} D={config['hidden_size']}, "
        f"{config['num_layers']} blocks, K=V={config['head_dim']}, vocabulary "
        f"{config['vocab_size']}, {'gated' if config['gated'] else 'ungated'}; ours in "
        f"{config['dtype']}, remat={config['remat']}; {'; '.join(machines)}"
    )
    return [head, table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
