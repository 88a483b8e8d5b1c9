"""Does a second or third factor predict text better at equal parameters, and far beyond training?

    python -m experiments.language.paper --workdir=runs/paper --archive=runs/text/text.tar.xz \\
        --leg=213m_2 --train_s=480
    python -m experiments.language.paper --workdir=runs/paper --stages=draw

makes the text of ``experiments.language.pack_text`` tokens, trains one model of the paper's on its
code, measures it and keeps what is small in ``records/LEG_seedN``: losses of training, losses by
position on code that was held out and on prose, effective ranks, samples. The same command goes on
where it stood, so that a leg may take several sessions of a machine; ``--train_s`` ends training
for this time, saved. ``--stages=draw`` puts the records of all legs that are in the folder into one
table and two figures, wherever they were made: it needs no checkpoint.

Legs are the paper's 213M with n_h = 1, 2 and 3, a gated one, and models of 36M parameters beside
attention, Mamba-2 and a hybrid (``experiments/lib/language_legs.py``).

Source: https://arxiv.org/abs/2502.10297, language modelling, length extrapolation, effective rank.
Expect: in the paper n_h = 3 is best within 4,096 tokens and keeps its loss beyond; what came out
    here: experiments/results/language/paper/README.md.
Takes: on one H200 three minutes to train a leg of 36M, ten a leg of 213M, and a few to compile and
    measure; seconds of ``--leg=tiny``.
"""

import dataclasses
import hashlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.files import errors_as_one_line, read_json, read_lines, user_path
from deltaproduct_jax.settings import check_fields, seed_setting, setting
from deltaproduct_jax.training.records import METRICS, RESULTS, RUN, MetricsLine
from deltaproduct_jax.training.stopping import exit_code
from experiments.lib import archives, flags
from experiments.lib.bench.report import begun, markdown, shown, write_json, write_report
from experiments.lib.figures.legs import draw_losses, draw_positions
from experiments.lib.figures.records import from_record
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.language_legs import (
    DOMAINS,
    LEGS,
    TRAINING,
    Leg,
    curve,
    measurements,
    preparations,
    records_of,
    samples,
)

STAGES = ("prepare", "train", "measure", "draw")
SAMPLES = "samples.txt"
# Of a part that was told to end; the second, while it is still starting.
STOPPED = (exit_code(signal.SIGTERM), -signal.SIGTERM)
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
class PaperConfig:
    """Which leg, how far, and what of it; raises ConfigError where the fields make no sense."""

    leg: str = setting("213m_2", f"one of {', '.join(LEGS)}")
    stages: tuple[str, ...] = setting(STAGES, f"in turn, among {', '.join(STAGES)}", filled=True)
    archive: str | None = setting(None, "of experiments.language.pack_text; none: already unpacked")
    tokenizer: str = setting("mistral", "as of experiments.prepare_text")
    tokens: int = setting(200_000_000, "trained on")
    train_length: int = setting(4096, "tokens of a row")
    batch_size: int = setting(32, "rows of an update")
    accumulation_steps: int = setting(
        1, "parts of a batch whose gradients are added in turn", least=1
    )
    learning_rate: float = setting(6e-4, "peak learning rate; it falls to a tenth", above=0)
    train_s: float | None = setting(
        None, "seconds of this start's training; none: to its end", above=0
    )
    length: int = setting(32768, "tokens of the rows measured")
    rank_length: int = setting(16384, "tokens of the row whose ranks are taken")
    rows: int = setting(16, "rows measured, of each text")
    seed: int = seed_setting("of parameters and data")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        require_one_of("leg", self.leg, LEGS)
        for stage in self.stages:
            require_one_of("stages", stage, STAGES)
        for name in ("tokens", "train_length", "batch_size", "length", "rank_length", "rows"):
            require_at_least(name, getattr(self, name), 1)
        if self.batch_size % self.accumulation_steps:
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
    def steps(self) -> int:
        """Updates of the parameters."""
        return self.tokens // (self.batch_size * self.train_length)


def prepare(config: PaperConfig, workdir: Path) -> None:
    """Unpacks the archive, and makes its text tokens."""
    text = workdir / "text"
    if config.archive is not None:
        unpack(user_path(config.archive), text)
    if not text.exists():
        raise ConfigError(f"archive is missing; {text} is not there either")
    for command in preparations(workdir, config.tokenizer).values():
        run(command)


def unpack(path: Path, text: Path) -> None:
    """Unpacks an archive, whole or not at all; text that is there already, of this one, stays.

    Raises:
        ConfigError: it cannot be read, or the text that is there is of another.
    """
    origin, partial = text.with_name("text.json"), text.with_name("text.partial")
    if text.exists():
        if path.is_file() and origin.exists() and read_json(origin, Origin) != origin_of(path):
            raise ConfigError(f"archive={str(path)!r} is not what {text} is of; give a new workdir")
        return
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with archives.opened(path, "archive") as archive:
            archive.extractall(partial, filter="data")
        missing = [domain for domain in DOMAINS if not (partial / domain).is_dir()]
        if missing:
            raise ConfigError(
                f"archive={str(path)!r} has no folder {' or '.join(missing)}; it may be one of "
                "experiments.language.pack_text, of a source with code and prose"
            )
        write_json(origin, origin_of(path))
        with errors_as_one_line(text, "unpacked"):
            partial.rename(text)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Origin(TypedDict):
    """Which archive text was unpacked from."""

    sha256: str


def origin_of(path: Path) -> Origin:
    """That of an archive."""
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def train(config: PaperConfig, leg: Leg) -> bool:
    """Trains for as long as it may; whether the run is finished. What is known of it is kept."""
    settings = (config.batch_size, config.accumulation_steps, config.steps, config.learning_rate)
    run(leg.training(config.train_length, *settings), limit_s=config.train_s)
    rows = read_lines(leg.run / METRICS, MetricsLine)
    if not rows:  # it ended before its first record
        return False
    results = leg.run / RESULTS
    record = {
        "leg": leg.name,
        "seed": leg.seed,
        "starts": read_json(leg.run / RUN),
        "curve": curve(rows),
        "results": read_json(results) if results.exists() else None,
    }
    write_json(leg.records / TRAINING, record)
    return results.exists()


def run(command: Sequence[str], *, limit_s: float | None = None, output: Any = None) -> None:
    """Runs a command, which is told to save and end when its time is over.

    Raises:
        ConfigError: it failed; it has said why.
    """
    shown_as = " ".join(command[1:])
    print(shown_as, file=sys.stderr, flush=True)
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=output)
    try:
        child.wait(limit_s)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)
        child.wait()
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    out_of_time = limit_s is not None and time.monotonic() - began >= limit_s
    if child.returncode and not (out_of_time and child.returncode in STOPPED):
        raise ConfigError(f"a part failed with {child.returncode}, see above: {shown_as}")


def measure(config: PaperConfig, leg: Leg) -> None:
    """What a trained model is asked; each answer is written as soon as it is there."""
    with open(leg.records / SAMPLES, "w", encoding="utf-8") as file:
        run(samples(leg), output=file)
    for command in measurements(leg, config.length, config.rank_length, config.rows):
        run(command)
    # What all legs' table and figures show need not stand here too.
    for spare in [*leg.records.glob("*.npz"), *leg.records.glob("extrapolation.[mp]*")]:
        spare.unlink()


def rows_of(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a leg: tokens, losses, and those by position at the end of each text's rows."""
    rows = []
    for record in found:
        last, results = record["curve"][-1], record["results"]
        validated = [row["valid_loss"] for row in record["curve"] if "valid_loss" in row]
        tests = results["test"][-1] if results else {}
        rates = [row["tokens_per_second"] for row in record["curve"] if "tokens_per_second" in row]
        rows.append(
            {
                **{"leg": record["leg"], "seed": record["seed"], "tokens": last["tokens"]},
                "parameters": results and results["parameters"]["total"],
                "tokens_per_second": statistics.median(rates) if rates else None,
                "valid_loss": validated[-1] if validated else None,
                **{name: tests.get(name) for name in ("loss", "bits_per_byte")},
                "last_eighth": {e["data"]: _last_eighth(e["loss"]) for e in record["positions"]},
            }
        )
    return rows


def _last_eighth(loss: Sequence[float]) -> float:
    last = loss[-max(1, len(loss) // 8) :]
    return sum(last) / len(last)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    texts = sorted({text for row in rows for text in row["last_eighth"]})
    lines = [
        [
            *(row["leg"], row["seed"]),
            *(shown(row[name], ",d") for name in ("tokens", "parameters")),
            shown(row["tokens_per_second"], ",.0f"),
            *(shown(row[name], ".4f") for name in ("valid_loss", "loss", "bits_per_byte")),
            *(shown(row["last_eighth"].get(text), ".4f") for text in texts),
        ]
        for row in rows
    ]
    head = ("leg", "seed", "tokens", "parameters", "median tokens/s", "validation loss")
    head += ("test loss", "bits per byte")
    return markdown((*head, *(f"{text}, last eighth" for text in texts)), lines)


def command(argv: Sequence[str]) -> None:
    """Runs the stages in turn."""
    parsed = flags.parse(argv, {"paper": PaperConfig, **SECTION}, PRESETS)
    config, workdir = PaperConfig(**parsed.sections["paper"]), parsed.workdir.resolve()
    look = Look(**parsed.sections["figures"])
    workdir.mkdir(parents=True, exist_ok=True)
    leg = Leg(config.leg, config.seed, workdir)
    if "prepare" in config.stages:
        prepare(config, workdir)
    finished = train(config, leg) if "train" in config.stages else (leg.run / RESULTS).exists()
    if not finished and {"train", "measure"} & set(config.stages):
        goes_on = "the same command" if "train" in config.stages else "the stage train"
        print(f"{leg.label} is not finished; {goes_on} goes on", file=sys.stderr)
    elif "measure" in config.stages:
        measure(config, leg)
    if "draw" in config.stages:
        found = records_of(workdir)
        with from_record(workdir / "records"):
            draw_losses(found, workdir / "losses", look)
            draw_positions(found, workdir / "positions", look)
        legs = [f"{record['leg']}_seed{record['seed']}" for record in found]
        record = begun("language.paper", argv, legs=legs, rows=rows_of(found))
        print(write_report(workdir, "legs", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What legs.md holds."""
    return [table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
