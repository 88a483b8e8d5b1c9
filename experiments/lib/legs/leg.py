"""Models that are trained on the same text one after another, each a leg, and the commands of one.

A leg is: text to tokens, a training run, its measurements. Every command goes on where it stood.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import read_json, read_lines
from deltaproduct_jax.training.records import METRICS, RUN, MetricsLine, Results, read_results
from experiments.lib.bench.report import write_json

TRAINING, EXTRAPOLATION, RANKS = "training.json", "extrapolation.json", "effective_rank.json"
SAMPLES = "samples.txt"
LOCK = ".legs.lock"  # on a folder: had by what makes all legs, or shared by those of one
TRAINED_BY = "language_modeling"  # the script of experiments

# Of the kernel's sources, directories that are not trained on.
VALID_PATHS = ("*/fs/xfs/*", "*/mm/*")
TEST_PATHS = ("*/fs/btrfs/*", "*/net/ipv4/*")
DOMAINS = ("code", "prose")
PROMPTS = ("static int ", "/* SPDX-License-Identifier: GPL-2.0 */\n#include <linux/")

_GATED = ("--mixer=gated_delta_product",)
# At about 36 million parameters; heads as the paper matches them, by n_h.
_BLOCKS = ("--hidden_size=384", "--num_layers=12")
_SMALL = (*_BLOCKS, "--intermediate_size=1024")
# The published layer: one group of keys and queries of 128, twice the width in heads of 64, decays
# in (0, 1). A narrower MLP makes up for its wider layer.
_HEADS = ("--num_heads=1", "--num_v_heads=12", "--expand_v=0.5", "--allow_neg_eigval=false")
_MAMBA2 = ("--mixer=mamba2", *_BLOCKS, *_HEADS, "--intermediate_size=832")
LEGS: dict[str, tuple[str, ...]] = {
    "213m_1": ("--preset=213m_1",),
    "213m_2": ("--preset=213m_2",),
    "213m_3": ("--preset=213m_3",),
    "213m_2_gated": ("--preset=213m_2", *_GATED),
    "36m_1": ("--preset=213m_1", *_SMALL, "--num_heads=4"),
    "36m_2": ("--preset=213m_2", *_SMALL, "--num_heads=3"),
    "36m_3": ("--preset=213m_3", *_SMALL, "--num_heads=2"),
    "36m_2_gated": ("--preset=213m_2", *_SMALL, "--num_heads=3", *_GATED),
    "36m_2_hybrid": ("--preset=213m_2", *_SMALL, "--num_heads=3", "--attention_every=4"),
    "36m_transformer": ("--preset=213m_1", *_SMALL, "--num_heads=4", "--mixer=transformer"),
    "36m_mamba2": ("--preset=213m_1", *_MAMBA2),
    "tiny": ("--preset=tiny", "--num_layers=1", "--hidden_size=64", "--num_heads=2"),
}
# Legs without Householder factors have no states whose ranks could be taken.
_WITHOUT_FACTORS = ("36m_transformer", "36m_mamba2")


# Parts of a batch of 32 rows of 4,096 tokens, so that two legs fit on one GPU.
PARTS = {"213m": 4, "36m": 1, "tiny": 1}
# Of an H200's memory, what training takes whatever a batch has, and what a whole batch adds.
KEPT, OF_A_BATCH = 0.05, {"213m": 1.04, "36m": 0.22, "tiny": 0.22}
# Seconds of an H200 for 200 million tokens; what counts is how legs compare.
SECONDS = {
    "213m_1": 682,
    "213m_2": 762,
    "213m_3": 708,
    "213m_2_gated": 765,
    "36m_1": 157,
    "36m_2": 165,
    "36m_3": 166,
    "36m_2_gated": 194,
    "36m_2_hybrid": 177,
    "36m_transformer": 243,
    "36m_mamba2": 678,
    "tiny": 60,
}


def parts_of_leg(name: str) -> int:
    """Of a batch of a leg of `LEGS`, by its name."""
    return PARTS[name.partition("_")[0]]


def share_of_leg(name: str, parts: int) -> float:
    """Of an H200's memory for training it, with a batch in so many parts."""
    return min(1.0, KEPT + OF_A_BATCH[name.partition("_")[0]] / parts)


@dataclasses.dataclass(frozen=True)
class Leg:
    """One model on one text.

    Attributes:
        name: of `LEGS`.
        seed: of its parameters and data.
        workdir: of all legs; text and tokens are shared.
    """

    name: str
    seed: int
    workdir: Path

    @property
    def label(self) -> str:
        """Name and seed."""
        return f"{self.name}_seed{self.seed}"

    @property
    def run(self) -> Path:
        """The run directory, with checkpoints."""
        return self.workdir / "runs" / self.label

    @property
    def records(self) -> Path:
        """What is kept when the checkpoints are gone."""
        return self.workdir / "records" / self.label

    def remove_spares(self) -> None:
        """Removes of what measuring wrote that which all legs' table and figures show."""
        shown = [self.records.glob(f"{Path(name).stem}.[mp]*") for name in (EXTRAPOLATION, RANKS)]
        for spare in itertools.chain(self.records.glob("*.npz"), *shown):
            spare.unlink()

    def tokens(self, domain: str) -> Path:
        """Tokens of "code" or "prose"."""
        return self.workdir / "tokens" / domain

    def training(self, length: int, rows: int, parts: int, steps: int, rate: float) -> list[str]:
        """The command that trains."""
        return module(
            TRAINED_BY,
            *LEGS[self.name],
            workdir=self.run,
            data=self.tokens("code"),
            train_length=length,
            eval_lengths=length,
            select_length=length,
            batch_size=rows,
            accumulation_steps=parts,
            steps=steps,
            seed=self.seed,
            learning_rate=rate,
            end_learning_rate=f"{rate / 10:g}",
            warmup_steps=min(100, steps // 10),
            weight_decay=0.1,
            log_every=max(1, steps // 200),
            eval_every=max(1, steps // 8),
            checkpoint_every=steps,
            eval_sequences=64,
            eval_batch_size=8,
        )


def module(name: str, *flags: str, **settings: object) -> list[str]:
    """The command of a script of ours."""
    spelled = [f"--{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", f"experiments.{name}", *flags, *spelled]


def preparations(workdir: Path, tokenizer: str) -> dict[str, list[str]]:
    """Commands that make the text of an archive tokens, by domain."""
    code = {"valid_paths": ",".join(VALID_PATHS), "test_paths": ",".join(TEST_PATHS)}
    # Prose is only measured on; what is not its test is left unread.
    splits = {"code": code, "prose": {"valid_fraction": 0.05, "test_fraction": 0.9}}
    return {
        domain: module(
            "prepare_text",
            workdir=workdir / "tokens" / domain,
            sources=workdir / "text" / domain,
            pattern="*",
            tokenizer=tokenizer,
            **of_domain,
        )
        for domain, of_domain in splits.items()
    }


class Part(NamedTuple):
    """One of the measurements of a leg.

    Attributes:
        name: of its log.
        command: what is run.
        record: what is there when it is done.
        output: where its standard output goes, None if it writes the record itself.
        settings: what the record's "config" has of what was asked.
    """

    name: str
    command: list[str]
    record: Path
    output: Path | None = None
    settings: Mapping[str, object] = MappingProxyType({})

    def is_done(self) -> bool:
        """Whether the record is there, whole, and of these settings."""
        if not self.settings:
            return self.record.exists()
        with contextlib.suppress(RunDirectoryError):
            saved = read_json(self.record, _Measured)["config"]
            return all(saved.get(name) == value for name, value in self.settings.items())
        return False


class _Measured(TypedDict):
    config: dict[str, Any]


def measurements(leg: Leg, length: int, rank_length: int, rows: int) -> list[Part]:
    """What a trained leg is asked, none of it in need of another."""
    texts = f"{leg.tokens('code')},{leg.tokens('prose')}"
    kept = {"workdir": leg.records, "checkpoint": "newest"}
    read = {"length": length, "rows": rows}
    extrapolation = module(
        "analysis.length_extrapolation",
        **kept,
        **read,
        runs=leg.run,
        data=texts,
        batch_size=rows,
        window=math.gcd(256, length),
    )
    ranked = {"length": rank_length}
    ranks = module(
        "analysis.effective_rank",
        **kept,
        **ranked,
        dtype="float32",
        run=leg.run,
        data=leg.tokens("prose"),
        every=math.gcd(16, rank_length),
    )
    written = leg.records / SAMPLES
    parts = [
        Part("samples", samples(leg), written, output=written),
        Part("extrapolation", extrapolation, leg.records / EXTRAPOLATION, settings=read),
    ]
    if leg.name not in _WITHOUT_FACTORS:
        parts.append(Part("effective_rank", ranks, leg.records / RANKS, settings=ranked))
    return parts


def samples(leg: Leg) -> list[str]:
    """The command whose output is what the leg writes."""
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    settings = {"samples": 2, "max_tokens": 300, "temperature": 0.8, "top_p": 0.95}
    return module("generate", *prompts, run=leg.run, checkpoint="newest", **settings)


class _Row(TypedDict):
    tokens: int
    loss: NotRequired[float]
    valid_loss: NotRequired[float]
    tokens_per_second: NotRequired[float]


class _Parameters(TypedDict):
    total: int


class _Test(TypedDict):
    loss: NotRequired[float]
    bits_per_byte: NotRequired[float]


class _Results(TypedDict):
    parameters: _Parameters
    test: list[_Test]


class Training(TypedDict):
    """The record of a leg's training, as far as it is read back."""

    leg: str
    seed: int
    curve: list[_Row]
    results: Annotated[Results, _Results] | None


class _Curve(TypedDict):
    data: str
    label: str
    trained: int | None
    position: list[float]
    loss: list[float]
    error: list[float] | None
    running_loss: list[float]


class Positions(TypedDict):
    """What `experiments.analysis.length_extrapolation` wrote of it, likewise."""

    curves: list[_Curve]


class _Head(TypedDict):
    trained: float | None
    end: float
    kept_at_starts: float | None


class Along(TypedDict):
    """Ranks along a row over all heads, as `analysis.effective_rank.over_heads` has them."""

    position: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Ranks(TypedDict):
    """What `experiments.analysis.effective_rank` wrote of it."""

    trained: int | None
    starts: list[int]
    heads: dict[str, list[_Head]]
    along: Along


def keep(leg: Leg) -> None:
    """Writes what is known of a leg's training, if it has come to its first record."""
    rows = read_lines(leg.run / METRICS, MetricsLine)
    if not rows:
        return
    record = {
        "leg": leg.name,
        "seed": leg.seed,
        "starts": read_json(leg.run / RUN),
        "curve": curve(rows),
        "results": read_results(leg.run),
    }
    write_json(leg.records / TRAINING, record)


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of records of training what a figure needs, to six digits."""
    names = ("step", "tokens", "loss", "valid_loss", "valid_bits_per_byte")
    names += ("tokens_per_second", "mfu", "grad_norm")
    short = lambda x: float(f"{x:.6g}") if isinstance(x, float) else x
    return [{name: short(row[name]) for name in names if name in row} for row in rows]


def records_of(workdir: Path) -> list[dict[str, Any]]:
    """What is kept of every leg of a folder: as `Training`, "positions", and "ranks" or None.

    Raises:
        ConfigError: there is none.
        RunDirectoryError: a record cannot be read.
    """
    paths = sorted(workdir.glob(f"records/*/{TRAINING}"))
    found: list[dict[str, Any]] = [dict(read_json(path, Training)) for path in paths]
    if not found:
        raise ConfigError(
            f"workdir={str(workdir)!r} has no records/LEG/{TRAINING}; the stage train writes it"
        )
    for path, record in zip(paths, found, strict=True):
        problem = _wrong_with_curve(record["curve"])
        if problem is None and record["results"] is not None and not record["results"]["test"]:
            problem = "results.test is empty; it must have an entry at least"
        if problem is not None:
            raise RunDirectoryError(f"{path}: {problem}")
        places = path.with_name(EXTRAPOLATION)
        record["positions"] = read_json(places, Positions)["curves"] if places.exists() else []
        for index, entry in enumerate(record["positions"]):
            problem = _wrong_with_positions(entry, f"curves[{index}]")
            if problem is not None:
                raise RunDirectoryError(f"{places}: {problem}")
        ranks = path.with_name(RANKS)
        record["ranks"] = read_json(ranks, Ranks) if ranks.exists() else None
    return found


def _wrong_with_curve(rows: Sequence[Mapping[str, Any]]) -> str | None:
    if not rows:
        return "curve is empty; it must have an entry at least"
    few = (f"curve[{i}].tokens={row['tokens']}" for i, row in enumerate(rows) if row["tokens"] < 1)
    found = next(few, None)
    return None if found is None else f"{found} is too small; it must be at least 1"


def _wrong_with_positions(entry: Mapping[str, Any], name: str) -> str | None:
    """What keeps a curve by position from being drawn: lists that differ, no places."""
    places = entry["position"]
    if not places or min(places) < 1:
        return f"{name}.position must have a place at least, each from 1 on"
    for column in ("loss", "error", "running_loss"):
        if entry[column] is not None and len(entry[column]) != len(places):
            return (
                f"{name}.{column} has {len(entry[column])} entries; it must have {len(places)}, "
                "as position"
            )
    return None
