"""How long do the paper's constructions hold, as weights of the real model in real floats?

    python -m experiments.theory --workdir=runs/theory

runs each construction of ``deltaproduct_jax.theory`` over random words, in pieces that pass the
state on, until ``--length`` tokens are read, the time is up, or half of a piece's answers are
wrong. ``results.json`` is a list with an entry a construction, dtype and implementation:

- ``length``: tokens up to which not one answer of any word was wrong, BOS's not counted;
- ``errors``: wrong answers of all ``words`` over ``length_read`` tokens;
- ``min_margin``: smallest difference between the right logit and the largest other, over the
  largest in size, while all answers were right;
- ``deviation``: largest distance of the direction of the logits from that in exact arithmetic;
- ``curve``: deviation and errors so far, over length.

- ``made_by``: the command and the machine.

``theory.md`` is the table and ``theory.png`` draws the curves. What ``results.json`` of the
directory holds already, of the same device, length, words, piece and seed, is not run again. With
``--rows_from`` nothing is run: the rows of other directories are put together with this one's, and
of rows that differ in nothing but in how far they read, the one that read furthest is kept.
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.files import write_file
from deltaproduct_jax.models.config import DTYPES
from deltaproduct_jax.ops.dispatch import AVAILABLE
from deltaproduct_jax.settings import setting
from deltaproduct_jax.theory import CATALOGUE, Construction, construct
from experiments.lib import flags
from experiments.lib.bench.timing import machine
from experiments.lib.figures.plots import save

PRESETS = {
    "default": {},
    "quick": {"constructions": ("permutations_S3", "plane_Z5"), "length": 2000, "words": 2},
}
POINTS_A_DECADE = 4
CASE = ("construction", "dtype", "implementation", "device")


@dataclasses.dataclass(frozen=True)
class TheoryConfig:
    """What is run; raises ConfigError where the fields make no sense."""

    constructions: tuple[str, ...] = setting(tuple(CATALOGUE), f"some of {', '.join(CATALOGUE)}")
    dtypes: tuple[str, ...] = setting(DTYPES, f"some of {', '.join(DTYPES)}")
    implementations: tuple[str, ...] = setting(("chunked",), f"some of {', '.join(AVAILABLE)}")
    length: int = setting(1_000_000, "tokens of a word after BOS")
    words: int = setting(8, "words read side by side")
    piece: int = setting(1000, "tokens read at once; the state is passed on")
    budget_s: float = setting(300.0, "seconds after which no further piece of a run begins")
    seed: int = setting(0, "draws the words")
    rows_from: tuple[str, ...] = setting(
        (), "results.json files whose rows are put beside those of this directory; nothing is run"
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, allowed in (
            ("constructions", CATALOGUE),
            ("dtypes", DTYPES),
            ("implementations", AVAILABLE),
        ):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; it may be some of {', '.join(allowed)}")
            for entry in getattr(self, name):
                require_one_of(name, entry, allowed)
        for name in ("length", "words", "piece"):
            require_at_least(name, getattr(self, name), 1)
        if not self.budget_s > 0:
            raise ConfigError(f"budget_s={self.budget_s} must be greater than 0")


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
    construction: Construction, dtype: str, implementation: str, config: TheoryConfig
) -> dict[str, Any]:
    """Reads words until the end, the budget, or half of the answers being wrong.

    Products of float32 are in float32, which on a GPU or TPU is not what JAX does unasked.
    """
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        return _run(construction, dtype, implementation, config)


def _run(
    construction: Construction, dtype: str, implementation: str, config: TheoryConfig
) -> dict[str, Any]:
    model = construction.model(dtype, implementation)
    # Split once: walking through the module at every piece would take as long as reading it.
    graph, params = nnx.split(model)
    read_piece = reader(construction)
    read = jax.jit(
        lambda params, *args: read_piece(nnx.merge(graph, params), *args), static_argnums=4
    )
    bos = jnp.full((config.words, 1), construction.bos)
    logits, state = nnx.jit(lambda model, bos: model.forward(bos))(model, bos)
    if np.argmax(logits.astype(jnp.float32), -1).tolist() != [[construction.answer_to_bos]] * len(
        bos
    ):
        raise FloatingPointError(f"{construction.name} in {dtype} answers BOS wrongly")
    at, key = jnp.zeros(config.words, jnp.int32), jax.random.key(config.seed)
    tokens, errors, length, margin, curve = 0, 0, None, np.inf, []
    began = time.monotonic()
    while tokens < config.length and (not tokens or time.monotonic() - began < config.budget_s):
        T = min(config.piece, config.length - tokens)
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
        "num_householder": construction.config.factors_per_token,
        "dtype": dtype,
        "implementation": implementation,
        "device": device(),
        "letters": len(construction.letters),
        "units": construction.config.mlp_width,
        **{name: getattr(config, name) for name in ("words", "piece", "seed")},
        "length_wanted": config.length,
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
    """A few points a decade, each with the largest deviation since the one before; and the last."""
    kept, largest, due = [], 0.0, 0.0
    for point in curve:
        largest = max(largest, point["deviation"])
        if point["length"] >= due or point is curve[-1]:
            kept.append({**point, "deviation": largest})
            largest, due = 0.0, point["length"] * 10 ** (1 / POINTS_A_DECADE) * (1 - 1e-9)
    return kept


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, and below them the commands that made them."""
    names = (
        "construction", "group", "letters", "num_layers", "num_householder", "dtype",
        "implementation", "length", "length_read", "errors", "min_margin", "deviation", "device",
    )  # fmt: skip
    made_by = list(dict.fromkeys(row["made_by"] for row in rows))
    lines = [(*names, "made by"), ["---"] * (len(names) + 1)]
    for row in rows:
        margin = "-" if row["min_margin"] is None else f"{row['min_margin']:.4f}"
        shown = {**row, "min_margin": margin, "deviation": f"{row['deviation']:.1e}"}
        cells = [f"{shown[n]:,}" if isinstance(shown[n], int) else shown[n] for n in names]
        lines.append([*cells, made_by.index(row["made_by"]) + 1])
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return text + "\n\n" + "\n".join(f"{n}. {made}" for n, made in enumerate(made_by, 1))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the deviation from exact arithmetic over length, a panel a dtype."""
    cases = list(dict.fromkeys((row["dtype"], row["implementation"]) for row in rows))
    names = list(dict.fromkeys(row["construction"] for row in rows))
    figure = Figure(figsize=(5.5 * len(cases) + 2.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for row in rows:
            if (row["dtype"], row["implementation"]) != case:
                continue
            index = names.index(row["construction"])
            x = [point["length"] for point in row["curve"]]
            y = [max(point["deviation"], 1e-9) for point in row["curve"]]
            style = {"color": f"C{index % 10}", "linestyle": ("-", "--")[index // 10 % 2]}
            (line,) = axes.loglog(x, y, **style, label=row["construction"])
            if row["errors"]:
                reached = next(point for point in row["curve"] if point["errors"])
                axes.plot(
                    reached["length"], reached["deviation"], "x", color=line.get_color(), ms=9
                )
        axes.set(title=", ".join(case), xlabel="tokens (x: an answer was wrong)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("distance of the logits' direction from exact (below 1e-9: 1e-9)")
    panels[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.json; ConfigError if it is no list of them."""
    try:
        rows = json.loads(path.read_text())
        for row in rows:
            [row[name] for name in (*CASE, "length_read", "made_by")]
        return rows
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not a list of results: {error!r}") from error


def case_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a row from others."""
    return tuple(row[name] for name in CASE)


def put_together(paths: Sequence[Path]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Of each case the row that read furthest, the later one if they are even."""
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in itertools.chain.from_iterable(rows_of(path) for path in paths):
        before = kept.get(case_of(row))
        if before is None or row["length_read"] >= before["length_read"]:
            kept[case_of(row)] = row
    return kept


def command(argv: Sequence[str]) -> None:
    """Runs, prints the table, writes results.json, theory.md and theory.png."""
    parsed = flags.parse(argv, {"theory": TheoryConfig}, PRESETS)
    config = TheoryConfig(**parsed.sections["theory"])
    path = parsed.workdir / "results.json"
    own = [path] if path.exists() else []
    if config.rows_from:
        done = put_together([*own, *map(Path, config.rows_from)])
    else:
        done = run_missing(config, put_together(own), path, argv)
    order = {name: index for index, name in enumerate(CATALOGUE)}
    rows = sorted(done.values(), key=lambda row: order[row["construction"]])
    write_file(path, json.dumps(rows, indent=1).encode() + b"\n")
    text = table(rows) + "\n"
    write_file(parsed.workdir / "theory.md", text.encode())
    draw(rows, parsed.workdir / "theory.png")
    print(text)


def run_missing(
    config: TheoryConfig,
    done: dict[tuple[str, ...], dict[str, Any]],
    path: Path,
    argv: Sequence[str],
) -> dict[tuple[str, ...], dict[str, Any]]:
    """Runs what ``config`` wants and ``done`` has not, writing every row at once."""
    same = {name: getattr(config, name) for name in ("words", "piece", "seed")}
    same["length_wanted"] = config.length
    said = [word for word in argv if not word.startswith("--workdir")]
    made_by = f"`{' '.join(['python -m experiments.theory', *said])}` on {machine()}"
    wanted = itertools.product(config.constructions, config.dtypes, config.implementations)
    for name, dtype, implementation in wanted:
        case, made = (name, dtype, implementation, device()), construct(name)
        same["units"] = made.config.mlp_width  # so that rows of other tables are made anew
        if case in done and same.items() <= done[case].items():
            continue
        done[case] = run(made, dtype, implementation, config) | {"made_by": made_by}
        print(json.dumps(done[case]), file=sys.stderr, flush=True)
        write_file(path, json.dumps(list(done.values()), indent=1).encode() + b"\n")
        jax.clear_caches()
    return done


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
