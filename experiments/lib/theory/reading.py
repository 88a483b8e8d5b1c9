"""Constructions read random words until they fail: how long they hold, and how far off."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaproduct_jax.errors import ConfigError, RunDirectoryError, require_one_of
from deltaproduct_jax.files import named, read_json
from deltaproduct_jax.theory import CATALOGUE, Construction

POINTS_A_DECADE = 4
CASE = ("construction", "dtype", "implementation", "device")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is read.

    Attributes:
        length: tokens of a word after BOS.
        words: read side by side.
        piece: tokens read at once; the state is passed on.
        budget_s: seconds after which no further piece begins.
        seed: draws the words.
    """

    length: int
    words: int
    piece: int
    budget_s: float
    seed: int


def reader(construction: Construction) -> Callable:
    """A function ``(model, state, at [B], key, T)`` that reads T more random letters.

    It returns the model's state, the machine's ``[B]``, and of this piece: which answers were wrong
    ``[B, T]``, the margins ``[B, T]`` and the deviations ``[B, T]``.
    """
    letters, step = jnp.asarray(construction.letters), jnp.asarray(construction.step)
    answers = jnp.asarray(construction.answers)
    ideal = construction.ideal / np.linalg.norm(construction.ideal, axis=-1, keepdims=True)
    ideal = jnp.asarray(ideal, jnp.float32)

    def read(model, state, at, key, T):
        drawn_TB = jax.random.randint(key, (T, len(at)), 0, len(letters))

        def advance(at, drawn):
            at = step[at, drawn]
            return at, at

        at, at_TB = jax.lax.scan(advance, at, drawn_TB)
        logits, state = model.forward(letters[drawn_TB.T], state=state)
        logits = logits.astype(jnp.float32)
        wrong, margin = judge(logits, answers[at_TB.T])
        direction = logits[..., : ideal.shape[1]]
        direction /= jnp.maximum(jnp.linalg.norm(direction, axis=-1, keepdims=True), 1e-30)
        deviation = jnp.linalg.norm(direction - ideal[at_TB.T], axis=-1)
        return state, at, (wrong, margin, deviation)

    return read


def judge(logits: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which answers ``[B, T]`` are wrong, and by what part of the largest logit all are right."""
    is_right = jax.nn.one_hot(wanted, logits.shape[-1], dtype=bool)
    right = jnp.where(is_right, logits, 0).sum(-1)
    other = jnp.where(is_right, -jnp.inf, logits).max(-1)
    margin = (right - other) / jnp.maximum(jnp.abs(logits).max(-1), 1e-30)
    return ~(margin > 0), margin  # so written, a NaN is wrong


def run(
    construction: Construction, dtype: str, implementation: str, reading: Reading
) -> dict[str, Any]:
    """Reads words until the end, the budget, or half of the answers being wrong.

    Products of float32 are in float32, which on a GPU or TPU is not what JAX does unasked.
    """
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        return _run(construction, dtype, implementation, reading)


def _run(
    construction: Construction, dtype: str, implementation: str, reading: Reading
) -> dict[str, Any]:
    model = construction.model(dtype, implementation)
    # Split once: walking through the module at every piece would take as long as reading it.
    graph, params = nnx.split(model)
    read_piece = reader(construction)
    read = jax.jit(
        lambda params, *args: read_piece(nnx.merge(graph, params), *args), static_argnums=4
    )
    bos = jnp.full((reading.words, 1), construction.bos)
    logits, state = nnx.jit(lambda model, bos: model.forward(bos))(model, bos)
    if np.argmax(logits.astype(jnp.float32), -1).tolist() != [[construction.answer_to_bos]] * len(
        bos
    ):
        raise FloatingPointError(f"{construction.name} in {dtype} answers BOS wrongly")
    at, key = jnp.zeros(reading.words, jnp.int32), jax.random.key(reading.seed)
    tokens, errors, length, margin, curve = 0, 0, None, np.inf, []
    began = time.monotonic()
    while tokens < reading.length and (not tokens or time.monotonic() - began < reading.budget_s):
        T = min(reading.piece, reading.length - tokens)
        state, at, found = read(params, state, at, jax.random.fold_in(key, tokens), T)
        wrong, margins, deviations = map(np.asarray, found)
        at_fault = np.flatnonzero(wrong.any(0))
        if length is None:
            right = slice(0, at_fault[0] if len(at_fault) else None)
            margin = min(margin, margins[:, right].min(initial=np.inf))
            length = tokens + int(at_fault[0]) if len(at_fault) else None
        errors, tokens = errors + int(wrong.sum()), tokens + T
        curve.append({"length": tokens, "errors": errors, "deviation": float(deviations.max())})
        if wrong.mean() > 0.5:
            break
    return {
        "construction": construction.name,
        "group": construction.group,
        "num_layers": construction.config.num_layers,
        "num_householder": construction.config.num_householder,
        "dtype": dtype,
        "implementation": implementation,
        "device": device(),
        "letters": len(construction.letters),
        "units": construction.config.mlp_width,
        **{name: getattr(reading, name) for name in ("words", "piece", "seed")},
        "length_wanted": reading.length,
        "length": tokens if length is None else length,
        "length_read": tokens,
        "errors": errors,
        "min_margin": float(margin) if np.isfinite(margin) else None,
        "deviation": max(point["deviation"] for point in curve),
        "seconds": round(time.monotonic() - began, 1),
        "curve": thinned(curve),
    }


def device() -> str:
    """What the rows of this process are made on."""
    return jax.devices()[0].device_kind


def thinned(curve: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few points per decade, each with the largest deviation since the last; and the last one."""
    kept, largest, due = [], 0.0, 0.0
    for point in curve:
        largest = max(largest, point["deviation"])
        if point["length"] >= due or point is curve[-1]:
            kept.append({**point, "deviation": largest})
            largest, due = 0.0, point["length"] * 10 ** (1 / POINTS_A_DECADE) * (1 - 1e-9)
    return kept


class Point(TypedDict):
    """Of a row's curve: how far off and how often wrong after ``length`` tokens."""

    length: int
    errors: int
    deviation: float


class Row(TypedDict):
    """What tables and figures look at of an entry of results.json."""

    construction: str
    group: str
    num_layers: int
    num_householder: int
    dtype: str
    implementation: str
    device: str
    letters: int
    length: int
    length_read: int
    errors: int
    min_margin: float | None
    deviation: float
    curve: list[Point]
    made_by: str


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.json.

    Raises:
        ConfigError: it is no list of them.
    """
    try:
        rows = read_json(path, list[Row])
        for index, row in enumerate(rows):
            require_one_of(f"[{index}].construction", row["construction"], CATALOGUE)
        return rows
    except (RunDirectoryError, ConfigError) as error:
        raise ConfigError(f"{named(path)} is not a list of results: {error}") from error


def case_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a row from others."""
    return tuple(row[name] for name in CASE)


def put_together(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Of each case the row that read furthest, the later one if they are even."""
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        before = kept.get(case_of(row))
        if before is None or row["length_read"] >= before["length_read"]:
            kept[case_of(row)] = row
    return kept
