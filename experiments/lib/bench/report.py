"""What a measurement leaves: a record as JSON, tables as Markdown, and the command that made both.

A cell of a table holds one value; what has several gets a column for each. The Markdown is made of
the record alone, by the function ``page`` of the script that the record names, so that it can be
made again (`experiments.redraw`).
"""

import json
import math
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaproduct_jax.files import read_json, write_file

MOST_COLUMNS = 100
# What a shell takes for one, of a `command_line`.
_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")
PAGE = "page"  # key of a record: the script whose `page` shows it, by its name in experiments
# Paragraphs and tables of what a record holds, from the top.
Page = Callable[[Any], Sequence[str]]
# The columns of `times`.
TIMES = ("ms, median", "least", "most")


def command_line(script: str, argv: Sequence[str]) -> str:
    """The command as one would type it; ``script`` by its name within experiments."""
    return " ".join([f"python -m experiments.{script}", *map(_quoted, argv)])


def begun(script: str, argv: Sequence[str], **more: Any) -> dict[str, Any]:
    """A record before what is measured: whose it is, the command, and what more there is."""
    return {PAGE: script, "command": command_line(script, argv), **more}


def _quoted(argument: str) -> str:
    """An argument as a shell takes it, its value alone in quotes."""
    name, equals, value = argument.partition("=")
    if not equals or shlex.quote(value) == value:
        return argument if shlex.quote(argument) == argument else shlex.quote(argument)
    return f'{name}="{value}"' if not set(value) & set('"$`\\!') else f"{name}={shlex.quote(value)}"


def command_block(command: str) -> str:
    """The command as a paragraph; one too long for a line as a block of shell, cut before flags.

    It is not cut where a text in quotes looks like a flag.
    """
    short = f"Command: `{command}`"
    if len(short) <= MOST_COLUMNS:
        return short
    first, *words = _WORD.findall(command)
    lines = [first]
    for word in words:
        if word.startswith("--") and len(f"{lines[-1]} {word} \\") > MOST_COLUMNS:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(["Command:", "", "```sh", " \\\n".join(lines), "```"])


def listed(item: str) -> str:
    """An item of a list, with its mark, in lines that are not too long."""
    fill = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(item, MOST_COLUMNS, subsequent_indent=" " * (item.index(" ") + 1), **fill)


def markdown(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, without a newline at its end; None is shown as a dash."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(shown, line))} |" for line in lines)


def known_columns(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table without the columns of which no row knows anything."""
    kept = [place for place in range(len(head)) if any(shown(row[place]) != "-" for row in rows)]
    head, *rows = [[line[place] for place in kept] for line in (head, *rows)]
    return markdown(head, rows)


def shown(value: Any, form: str = "") -> str:
    """A value as a cell shows it, by a format specification such as ".1f"; a dash for None."""
    return "-" if value is None else format(value, form)


def times(row: Mapping[str, Any]) -> list[str]:
    """Median, least and most of a row with `Compiled.summary`, in milliseconds."""
    return [f"{row[f'{name}_ms']:.4g}" for name in ("median", "min", "max")]


def collect(
    record: dict[str, Any],
    measured: Iterable[Sequence[Mapping[str, Any]]],
    table: Callable[[Sequence[Any]], str],
    write: Callable[[dict[str, Any]], str],
) -> str:
    """Adds rows to a record as they are measured; what is measured stays, whatever comes next.

    Args:
        record: with its rows at "rows".
        measured: rows of one case after the other; their table goes to standard error.
        table: of rows, as Markdown.
        write: writes the record, and returns what its page holds.

    Returns:
        What it returned last.
    """
    text = ""
    for rows in measured:
        print(table(rows), file=sys.stderr)
        record["rows"] += rows
        text = write(record)
    return text


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes a value, whole or not at all; RunDirectoryError where that fails.

    Numbers that are not finite, which JSON does not have, become the words "inf", "-inf" and "nan",
    as ``float`` reads them.
    """
    write_file(path, json.dumps(_spelled(value), indent=indent, allow_nan=False).encode() + b"\n")


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _spelled(entry) for name, entry in value.items()}
    return [_spelled(entry) for entry in value] if isinstance(value, list | tuple) else value


def _as_numbers(value: Any) -> Any:
    """The opposite: the words of `write_json` as the numbers that they stand for."""
    if isinstance(value, str):
        return float(value) if value in ("inf", "-inf", "nan") else value
    if isinstance(value, Mapping):
        return {name: _as_numbers(entry) for name, entry in value.items()}
    return [_as_numbers(entry) for entry in value] if isinstance(value, list | tuple) else value


def report_of(record: Any, page: Page) -> str:
    """What the Markdown of a record holds, without a newline.

    Args:
        record: what its file holds. Where that is a command too, it closes the Markdown, by the
            name that its script has now.
        page: of the script.
    """
    closing = []
    if isinstance(record, Mapping):
        rest = record["command"].split(" ", 3)[3:]  # behind python -m MODULE
        closing = [command_block(" ".join([f"python -m experiments.{record[PAGE]}", *rest]))]
    return "\n\n".join([*page(_as_numbers(record)), *closing])


def write_report(
    workdir: Path, name: str, record: Any, page: Page, *, indent: int | None = 1
) -> str:
    """Writes NAME.json and NAME.md.

    Args:
        workdir: where they go.
        name: of both.
        record: what the JSON file holds; its "command" closes the Markdown.
        page: of the script; it sees what the file gives back, and nothing else.
        indent: of the JSON file.

    Returns:
        What NAME.md holds, without the newline at its end.
    """
    path = workdir / f"{name}.json"
    write_json(path, record, indent=indent)
    text = report_of(read_json(path), page)
    write_file(workdir / f"{name}.md", f"{text}\n".encode())
    return text
