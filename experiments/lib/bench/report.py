"""What a measurement leaves: a record as JSON, tables as Markdown, and the command that made both.

A cell of a table holds one value; what has several gets a column for each.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaproduct_jax.files import write_file

# The columns of `times`.
TIMES = ("ms, median", "least", "most")


def command_line(script: str, argv: Sequence[str]) -> str:
    """The command as one would type it; ``script`` by its name within experiments."""
    return " ".join([f"python -m experiments.{script}", *argv])


def markdown(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, without a newline at its end; None is shown as a dash."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(shown, line))} |" for line in lines)


def shown(value: Any, form: str = "") -> str:
    """A value as a cell shows it, by a format specification such as ".1f"; a dash for None."""
    return "-" if value is None else format(value, form)


def times(row: Mapping[str, Any]) -> list[str]:
    """Median, least and most of a row with `Compiled.summary`, in milliseconds."""
    return [f"{row[f'{name}_ms']:.4g}" for name in ("median", "min", "max")]


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes a value, whole or not at all; RunDirectoryError where that fails."""
    write_file(path, json.dumps(value, indent=indent).encode() + b"\n")


def write_report(workdir: Path, name: str, record: Mapping[str, Any], *blocks: str) -> str:
    """Writes NAME.json and NAME.md.

    Args:
        workdir: where they go.
        name: of both.
        record: what the JSON file holds; its "command" closes the Markdown.
        blocks: paragraphs and tables of the Markdown, from the top.

    Returns:
        What NAME.md holds, without the newline at its end.
    """
    write_json(workdir / f"{name}.json", record)
    text = "\n\n".join([*blocks, f"Command: `{record['command']}`"])
    write_file(workdir / f"{name}.md", f"{text}\n".encode())
    return text
