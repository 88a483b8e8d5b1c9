"""Does a second or third factor predict text better at equal parameters, and far beyond training?

    python -m experiments.language.paper --workdir=runs/paper --archive=runs/text/text.tar.xz \\
        --leg=213m_2 --train_s=480
    python -m experiments.language.paper --workdir=runs/paper --stages=draw

makes the text of ``experiments.language.pack_text`` tokens, trains one model of the paper's on its
code, measures it and keeps what is small in ``records/LEG_seedN``: losses of training, losses by
position on code that was held out and on prose, effective ranks, samples. The same command goes on
where it stood, so that a leg may take several sessions of a machine; ``--train_s`` ends training
for this time, saved. ``--stages=draw`` puts the records of all legs that are in the folder into one
table and three figures, wherever they were made: it needs no checkpoint. All legs on the GPUs of a
machine: ``experiments.language.legs``; in one folder only that stage runs beside it.

Legs are the paper's 213M with n_h = 1, 2 and 3, a gated one, and models of 36M parameters beside
attention, Mamba-2 and a hybrid (``experiments/lib/legs/leg.py``).

Source: https://arxiv.org/abs/2502.10297, language modelling, length extrapolation, effective rank.
Expect: in the paper n_h = 3 is best within 4,096 tokens and keeps its loss beyond; what came out
    here: experiments/results/language/paper/README.md.
Takes: on one H200 three minutes to train a leg of 36M, ten a leg of 213M, and a few to compile and
    measure; seconds of ``--leg=tiny``.
"""

import hashlib
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import errors_as_one_line, read_json, user_path
from deltaproduct_jax.training.locks import Lock, run_lock
from deltaproduct_jax.training.records import RESULTS
from experiments.lib import archives, flags
from experiments.lib.bench.report import begun, markdown, shown, write_json, write_report
from experiments.lib.children import held_or_inherited, run
from experiments.lib.figures.legs import draw_all
from experiments.lib.figures.records import from_record
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.folders import LEGS, refuse_other
from experiments.lib.legs.config import PRESETS, LegConfig
from experiments.lib.legs.leg import (
    DOMAINS,
    LOCK,
    Leg,
    keep,
    measurements,
    preparations,
    records_of,
)

PLACES = {"length_trained": "length trained", "last_eighth": "last eighth"}
RANK_COLUMNS = {
    "trained": "rank, length trained",
    "end": "rank, last quarter",
    "kept_at_starts": "least rank kept at starts",
}


def prepare(config: LegConfig, workdir: Path, lock: Lock) -> None:
    """Unpacks the archive, and makes its text tokens."""
    text = workdir / "text"
    with run_lock(workdir):
        if config.archive is not None:
            unpack(user_path(config.archive, "archive"), text)
        if not text.exists():
            raise ConfigError(f"archive is missing; {text} is not there either")
        for command in preparations(workdir, config.tokenizer).values():
            run(command, lock=lock)


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


def train(config: LegConfig, leg: Leg, lock: Lock) -> bool:
    """Trains for as long as it may; whether the run is finished. What is known of it is kept."""
    try:
        run(config.training(leg), limit_s=config.train_s, lock=lock)
    finally:  # of what was told to end too
        keep(leg)
    return (leg.run / RESULTS).exists()


def measure(config: LegConfig, leg: Leg, lock: Lock) -> None:
    """What a trained model is asked; each answer is written as soon as it is there."""
    keep(leg)
    with run_lock(leg.records):
        for part in measurements(leg, config.length, config.rank_length, config.rows):
            run(part.command, output=part.output, lock=lock)
        leg.remove_spares()


def rows_of(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a leg: tokens, losses, and those by position at the end of each text's rows; ranks."""
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
                "ranks": record["ranks"] and _ranks(record["ranks"]),
                "length_trained": {e["data"]: _length_trained(e) for e in record["positions"]},
                "last_eighth": {e["data"]: _last_eighth(e["loss"]) for e in record["positions"]},
            }
        )
    return rows


def _length_trained(entry: Mapping[str, Any]) -> float:
    """The mean up to there."""
    limit = entry["trained"] or math.inf
    pairs = zip(entry["position"], entry["loss"], strict=True)
    return statistics.fmean([loss for place, loss in pairs if place <= limit] or entry["loss"][:1])


def _last_eighth(loss: Sequence[float]) -> float:
    last = loss[-max(1, len(loss) // 8) :]
    return sum(last) / len(last)


def _ranks(ranks: Mapping[str, Any]) -> dict[str, float | None]:
    """Means over all heads, and the head that keeps least where documents begin."""
    heads = [head for block in ranks["heads"].values() for head in block]
    said = {
        name: [head[name] for head in heads if head[name] is not None]
        for name in ("trained", "end", "kept_at_starts")
    }
    means = {name: statistics.fmean(said[name]) if said[name] else None for name in said}
    return means | {"kept_at_starts": min(said["kept_at_starts"], default=None)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    texts = sorted({text for row in rows for text in row["last_eighth"]})
    ranked = RANK_COLUMNS if any(row["ranks"] for row in rows) else {}
    lines = [
        [
            *(row["leg"], row["seed"]),
            *(shown(row[name], ",d") for name in ("tokens", "parameters")),
            shown(row["tokens_per_second"], ",.0f"),
            *(shown(row[name], ".4f") for name in ("valid_loss", "loss", "bits_per_byte")),
            *(shown(row[of].get(text), ".4f") for text in texts for of in PLACES),
            *(shown((row["ranks"] or {}).get(name), ".2f") for name in ranked),
        ]
        for row in rows
    ]
    head = ("leg", "seed", "tokens", "parameters", "median tokens/s", "validation loss")
    head += ("test loss", "bits per byte")
    head += tuple(f"{text}, {place}" for text in texts for place in PLACES.values())
    return markdown((*head, *ranked.values()), lines)


def make(config: LegConfig, leg: Leg, lock: Lock) -> None:
    """The stages that write what is drawn; a lock on the folder goes to what they run."""
    if "prepare" in config.stages:
        prepare(config, leg.workdir, lock)
    trains = "train" in config.stages
    finished = train(config, leg, lock) if trains else (leg.run / RESULTS).exists()
    if not finished and {"train", "measure"} & set(config.stages):
        goes_on = "the same command" if trains else "the stage train"
        print(f"{leg.label} is not finished; {goes_on} goes on", file=sys.stderr)
    elif "measure" in config.stages:
        measure(config, leg, lock)


def command(argv: Sequence[str]) -> None:
    """Runs the stages in turn."""
    parsed = flags.parse(argv, {"paper": LegConfig, **SECTION}, PRESETS)
    config, workdir = LegConfig(**parsed.sections["paper"]), parsed.workdir.resolve()
    refuse_other(workdir, LEGS)
    look = Look(**parsed.sections["figures"])
    # This process computes nothing; an accelerator is for what it runs.
    jax.config.update("jax_platforms", "cpu")
    workdir.mkdir(parents=True, exist_ok=True)
    leg = Leg(config.leg, config.seed, workdir)
    if set(config.stages) - {"draw"}:
        with held_or_inherited(Lock(workdir / LOCK, shared=True)) as lock:
            make(config, leg, lock)
    if "draw" in config.stages:
        found = records_of(workdir)
        with from_record(workdir / "records"):
            list(draw_all(found, workdir, look))
        legs = [f"{record['leg']}_seed{record['seed']}" for record in found]
        record = begun("language.paper", argv, legs=legs, rows=rows_of(found))
        print(write_report(workdir, "legs", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What legs.md holds."""
    return [table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:], goes_on=True))
