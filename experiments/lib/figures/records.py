"""Figures and tables of the records that a folder keeps, whichever command wrote them."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaproduct_jax.errors import ConfigError, RunDirectoryError, require_one_of
from deltaproduct_jax.files import read_bytes, read_json, read_lines, write_file
from deltaproduct_jax.training.records import METRICS, MetricsLine
from experiments.lib.bench.report import PAGE, report_of
from experiments.lib.figures import benchmarks, geometry, language, legs, margin, plots, theory
from experiments.lib.figures.curves import bars_of, draw_panels, scores_of
from experiments.lib.figures.pages import page_of, text_of
from experiments.lib.figures.searched import search_figure, search_markdown
from experiments.lib.figures.style import Look, save
from experiments.lib.figures.tables import (
    escape_markdown,
    scores_markdown,
    to_csv,
)
from experiments.lib.legs.leg import EXTRAPOLATION, RANKS, TRAINING, records_of

FIGURE = "figure"  # key of records that say themselves which figure they are


def show(record: Mapping[str, Any], path: Path, look: Look) -> Iterator[Path]:
    """Writes the tables and the picture of a record of `experiments.figures`; their paths.

    Args:
        record: what it wrote.
        path: without an ending.
        look: width and formats of the picture.

    Raises:
        ConfigError: the record is of no known kind.
        NoMatplotlibError: matplotlib is missing; the tables are written by then.
    """
    kind = record[FIGURE]
    require_one_of(FIGURE, kind, MARKDOWN | PICTURES)
    if kind in MARKDOWN:
        text = MARKDOWN[kind](record)
        yield _written(path, ".csv", to_csv(record["rows"]))
        yield _written(path, ".md", text + "\n")
    if kind in PICTURES:
        yield from save(PICTURES[kind](record, look), path, look)


MARKDOWN: dict[str, Callable[[Any], str]] = {
    "table": lambda record: _noted(scores_markdown(record["rows"], record["by"]), record),
    "escape": lambda record: _noted(escape_markdown(record["rows"], record["by"]), record),
    "search": search_markdown,
}
PICTURES = {
    "cumulative": draw_panels,
    "table": scores_of,
    "escape": bars_of,
    "search": search_figure,
}


def _noted(table: str, record: Mapping[str, Any]) -> str:
    """The table, and below it which runs are not in it."""
    return f"{table}\n\nNote: {record['left_out']}." if "left_out" in record else table


def _written(path: Path, ending: str, text: str) -> Path:
    file = path.with_name(path.name + ending)
    write_file(file, text.encode())
    return file


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda record: isinstance(record, dict) and set(keys) <= record.keys()


def _rows_have(*keys: str) -> Callable[[Any], bool]:
    return lambda record: isinstance(record, list) and bool(record) and _has(*keys)(record[0])


def _speed(record: Any, path: Path, look: Look) -> list[Path]:
    return benchmarks.draw_speed(record["rows"], path, record["shape"], look)


def _scaling(record: Any, path: Path, look: Look) -> list[Path]:
    rows = {"T": record["by_length"], "num_householder": record["by_num_householder"]}
    return benchmarks.draw_scaling(rows, record["slopes"], path, look)


def _losses(record: Any, path: Path, look: Look) -> list[Path]:
    return language.draw_losses(record["rows"], path, look)


def _throughput(record: Any, path: Path, look: Look) -> list[Path]:
    ran = [row for row in record["rows"] if "error" not in row]
    return language.draw_throughput(ran, record["config"], path, look) if ran else []


def _extrapolation(record: Any, path: Path, look: Look) -> list[Path]:
    return language.draw_extrapolation(record["curves"], path, look)


def _legs(record: Any, path: Path, look: Look) -> Iterator[Path]:
    yield from legs.draw_all(records_of(path.parent), path.parent, look)


def _heads(record: Any, path: Path, look: Look) -> list[Path]:
    return geometry.draw_heads(record, title_of_heads(record), path, look)


def _models(record: Any, path: Path, look: Look) -> list[Path]:
    return geometry.draw_models(record["models"], path, look)


def _deviations(record: Any, path: Path, look: Look) -> Iterator[Path]:
    beside = path.with_name("theory")
    yield _written(beside, ".md", report_of(record, page_of("theory")) + "\n")
    yield from theory.draw_deviations(record, beside, look)


def _margin(record: Any, path: Path, look: Look) -> list[Path]:
    return margin.draw_margin(record["models"], path, look)


def title_of_heads(record: Mapping[str, Any]) -> str:
    """Group and layer of a record of `experiments.analysis.householder_geometry`."""
    return f"{record['config']['task']['group']}, layer {record['layer']}"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of record: its file's name, or None for any, what it holds, and how it is drawn."""

    name: str | None
    holds: Callable[[Any], bool]
    draw: Callable[[Any, Path, Look], Iterable[Path]]


KINDS = (
    Kind(None, _has(FIGURE), show),
    Kind("speed", _has("shape", "rows"), _speed),
    Kind("scaling", _has("by_length", "by_num_householder", "slopes"), _scaling),
    Kind("scaling", _has("config", "rows"), _losses),
    Kind("throughput", _has("config", "rows"), _throughput),
    Kind("extrapolation", _has("curves"), _extrapolation),
    Kind("legs", _has("legs"), _legs),
    Kind("geometry", _has("heads", "reflecting_heads"), _heads),
    Kind("geometry", _has("models"), _models),
    Kind("margin", _has("models", "accuracy"), _margin),
    Kind("results", _rows_have("construction", "curve"), _deviations),
)


@contextlib.contextmanager
def from_record(file: Path) -> Iterator[None]:
    """Says of what cannot be drawn, in one line, that it is the record's fault.

    What NumPy and matplotlib warn of on the way, of numbers at the ends of what floats hold, is
    either that or nothing to be seen in the picture.
    """
    try:
        with warnings.catch_warnings():
            for kind in (RuntimeWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = error if isinstance(error, ConfigError) else repr(error)
        raise RunDirectoryError(f"{file} cannot be drawn: {why}") from error


NAMES = {kind.name for kind in KINDS}
MOST_BEFORE = 100  # characters before the key that says whose record it is
KEYS = tuple(f'"{key}"'.encode() for key in (FIGURE, PAGE))


def drawn(folder: Path, look: Look, failed: Callable[[str], None]) -> Iterator[Path]:
    """Writes the tables and draws the pictures of the records in a folder and below; the files.

    Args:
        folder: where to look.
        look: width and formats of the pictures.
        failed: is called with a line for each record that cannot be read or drawn; others are.
    """
    for file in sorted(folder.rglob("*.json")):
        if file.name in (EXTRAPOLATION, RANKS) and file.with_name(TRAINING).exists():
            continue  # a leg's, which the table and the pictures of all legs show
        yield from _each(_of_record(file, look), failed)
    for file in sorted(folder.rglob(METRICS)):
        yield from _each(_of_metrics(file, look), failed)


def _each(files: Iterator[Path], failed: Callable[[str], None]) -> Iterator[Path]:
    try:
        yield from files
    except RunDirectoryError as error:
        failed(str(error))


def _of_record(file: Path, look: Look) -> Iterator[Path]:
    start = read_bytes(file)[:MOST_BEFORE]
    if file.stem not in NAMES and not any(key in start for key in KEYS):
        return  # another command's, whatever its size
    record, path = read_json(file), file.with_suffix("")
    fits = (k for k in KINDS if k.name in (None, file.stem) and k.holds(record))
    kind = next(fits, None)
    with from_record(file):
        text = text_of(record)
        if text is not None:
            yield _written(path, ".md", f"{text}\n")
        if kind is not None:
            yield from kind.draw(record, path, look)


def _of_metrics(file: Path, look: Look) -> Iterator[Path]:
    rows = read_lines(file, MetricsLine)
    if rows and plots.BITS in rows[0]:
        with from_record(file):
            yield from plots.plot_bits(file.parent, file.with_name(plots.BITS), look)
