"""The model card: a page beside a saved model that says what it is and how to load it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deltaproduct_jax.models import ModelConfig

CARD = "README.md"


def model_card(
    name: str,
    config: ModelConfig,
    parameters: int,
    facts: Mapping[str, Mapping[str, Any]],
    loading: Mapping[str, str],
) -> str:
    """A page in Markdown.

    Args:
        name: the title.
        config: what the model is made of.
        parameters: how many it has.
        facts: tables below it, rows by title; what is None is left out.
        loading: pieces of Python that load it, by title.
    """
    factors = config.value_of("num_householder")
    of = f" with {factors} Householder factors per token" if factors else ""
    lines = [f"# {name}", "", f"{config.mixer}{of}, {parameters:,} parameters."]
    for title, rows in {"Configuration": dataclasses.asdict(config), **facts}.items():
        lines += _table(title, rows)
    for title, code in loading.items():
        lines += ["", f"## {title}", "", "```python", code, "```"]
    return "\n".join([*lines, ""])


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    said = {key: value for key, value in rows.items() if value is not None}
    if not said:
        return []
    lines = ["", f"## {title}", "", "| what | value |", "|---|---|"]
    return [*lines, *(f"| {_cell(key)} | {_cell(value)} |" for key, value in said.items())]


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
