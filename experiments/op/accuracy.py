"""How far is each implementation of the op from float64, on easy, long and nasty inputs?

    python -m experiments.op.accuracy --workdir=runs/accuracy

The error of x is ``||x - ref|| / ||ref||``, where ref is computed token by token in NumPy float64
(`experiments.lib.bench.exact`) from the very same inputs, so that bfloat16 is not charged for
rounding q, k and v. There is a table for o, one for the worst gradient (of q, k, v, beta and g, for
random cotangents of o and of the last state), and one for g's own, which strong decay ruins first.

What exceeds the project's bars is marked and listed. In float32 they are 1e-5 for o and 3e-5 for a
gradient, or 30 times the plain recurrence's error in float32, if that is more. In bfloat16 they
are 1e-2 and 2e-2; on inputs without decay whose beta exceeds 1, where errors of the state never die
out, both are scaled up to 4 times the recurrence's error in o when it rounds the operands of its
products to bfloat16, which the last column shows. In float16 they are an eighth of bfloat16's, in
float64 1e-13 and 1e-12, or 30 times the recurrence's error. The recurrence of the op itself
computes in float32 at least and rounds only its results. What an implementation does not take has
no column. On a CPU "pallas_tpu" is interpreted; "triton" runs on a GPU alone.

A CPU multiplies bfloat16 inputs in float32. "chunked_as_gpu" and "chunked_as_tpu" cut the sequence
and round operands as "chunked" does on those platforms, and run anywhere. The order in which a GPU
adds, and that a TPU makes a float32 product of bfloat16 passes, are not part of it.

Source: this project; the nasty inputs are those that published kernels lose digits on.
Expect: float64 within the bars, float32 but for two entries with beta = 2 and (nearly) equal keys,
    where bfloat16 is over them too; experiments/results/op/accuracy/ and results/gpu/accuracy/.
Takes: 5 minutes on two CPU cores; with every dtype and peer 10.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.ops.precision import PRECISIONS
from deltaproduct_jax.ops.selection import AVAILABLE
from deltaproduct_jax.settings import check_fields, seed_setting, setting
from experiments.lib import flags
from experiments.lib.bench.accuracy import (
    BARS,
    ELSEWHERE,
    INPUTS,
    measure,
    over_the_bars,
)
from experiments.lib.bench.peers.jax_packages import PACKAGES, peer_op
from experiments.lib.bench.report import begun, markdown, write_report
from experiments.lib.bench.timing import machine


@dataclasses.dataclass(frozen=True)
class AccuracyConfig:
    """What is compared."""

    length: int = setting(2048, "tokens T of the short inputs", least=1)
    long_length: int = setting(65536, "tokens T of the long inputs", least=1)
    head_dim: int = setting(64, "key width K and value width V of the short inputs", least=2)
    long_head_dim: int = setting(16, "key width K and value width V of the long inputs", least=2)
    num_heads: int = setting(1, "heads H", least=1)
    num_householder: int = setting(2, "Householder factors per token", least=1)
    implementations: str = setting(
        ",".join(("recurrent", "associative", "chunked", *ELSEWHERE)),
        "comma list; recurrent, which bars refer to, among them",
    )
    peer: str | None = setting(
        None, f"comma list of JAX packages to compare with: {', '.join(PACKAGES)}"
    )
    dtypes: str = setting(
        "float32,bfloat16",
        f"comma list of {', '.join(BARS)}: q, k and v; beta and g are float32 at least",
    )
    chunk_size: int | None = setting(
        None, "tokens in a chunk of chunked; none: the op's choice", least=1
    )
    precision: str | None = setting(
        None,
        f"of our products: {', '.join(PRECISIONS)}; none: what the op does by itself",
        one_of=PRECISIONS,
    )
    seed: int = seed_setting("of the inputs")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        for name in self.implementations.split(","):
            require_one_of("implementations", name, [*AVAILABLE, *ELSEWHERE])
        if "recurrent" not in self.implementations.split(","):
            raise ConfigError(
                f"implementations={self.implementations!r} lacks 'recurrent', which the bars refer "
                f"to; it may hold any of {[*AVAILABLE, *ELSEWHERE]}, and that one"
            )
        for name in self.peers:
            require_one_of("peer", name, PACKAGES)
            peer_op(name)  # an error now, not after the first rows
        for name in self.dtypes.split(","):
            require_one_of("dtypes", name, BARS)

    @property
    def peers(self) -> list[str]:
        """The peers, in order."""
        return self.peer.split(",") if self.peer else []


def rows_of(config: AccuracyConfig) -> Iterator[dict[str, Any]]:
    """One row an input and dtype, the short inputs first."""
    for is_long in (False, True):
        yield from measure(
            [name for name, entry in INPUTS.items() if entry.is_long == is_long],
            config.dtypes.split(","),
            [*config.implementations.split(","), *config.peers],
            T=config.long_length if is_long else config.length,
            R=config.num_householder,
            H=config.num_heads,
            K=config.long_head_dim if is_long else config.head_dim,
            chunk_size=config.chunk_size,
            precision=config.precision,
            seed=config.seed,
        )


# What a table holds, and of which results the worst.
RESULTS = {"o": ("o",), "worst gradient": ("q", "k", "v", "beta", "g"), "gradient of g": ("g",)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, a table a dtype and result, and below them what exceeds the bars."""
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    blocks = [
        _table_of([row for row in rows if row["dtype"] == dtype], f"{dtype}: {result}", result)
        for dtype, result in itertools.product(dtypes, RESULTS)
    ]
    listed = []
    for row in rows:
        for name, found in over_the_bars(row).items():
            what = ", ".join(f"{n} {error:.1e} ({bar:.1e})" for n, (error, bar) in found.items())
            listed.append(f"- {row['input']}, {name} {row['dtype']}: {what}")
    heading = "Over the bars, which stand in brackets (q, k, v, beta, g: their gradients):"
    return "\n\n".join([*blocks, heading, "\n".join(listed or ["- nothing"])])


def _table_of(rows: Sequence[dict[str, Any]], title: str, result: str) -> str:
    """Errors of one result in one dtype, bold where they exceed their bar."""
    names = list(rows[0]["errors"])
    has_plain = result == "o" and rows[0]["dtype"] == "bfloat16"
    lines = []
    for row in rows:
        over, line = over_the_bars(row), [row["input"], row["T"], row["K"]]
        for name in names:
            kept = {n: row["errors"][name][n] for n in RESULTS[result] if n in row["errors"][name]}
            cell = f"{float(np.max(list(kept.values()))):.1e}" if kept else None
            line.append(f"**{cell}**" if kept.keys() & over.get(name, {}).keys() else cell)
        lines.append([*line, *[f"{row['plain_bfloat16']:.1e}"] * has_plain])
    return markdown([title, "T", "K = V", *names, *["bfloat16 products"] * has_plain], lines)


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes accuracy.json and accuracy.md."""
    parsed = flags.parse(argv, {"accuracy": AccuracyConfig}, {"default": {}})
    config = AccuracyConfig(**parsed.sections["accuracy"])
    rows = []
    for row in rows_of(config):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    over = [
        {"input": row["input"], "dtype": row["dtype"], "over": found}
        for row in rows
        if (found := over_the_bars(row))
    ]
    shape = f"B=1 H={config.num_heads} n_h={config.num_householder}"
    record = begun("op.accuracy", argv, shape=shape, machine=machine())
    record |= {"over_the_bars": over, "rows": rows}
    print(write_report(parsed.workdir, "accuracy", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What accuracy.md holds."""
    title = f"{record['shape']}, errors against float64; {record['machine']}"
    return [title, table([row | {"errors": _numbers(row["errors"])} for row in record["rows"]])]


def _numbers(errors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Errors as numbers, also those that a file spells out."""
    return {of: {name: float(error) for name, error in e.items()} for of, e in errors.items()}


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
