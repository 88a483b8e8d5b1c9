"""What a TPU's own compiler expects of the op, on a machine without a TPU.

    python -m experiments.hardware.tpu_estimate --workdir=runs/tpu
    python -m experiments.hardware.tpu_estimate --workdir=runs/tpu_peers --peer=tokamax \\
        --implementations=pallas_tpu
    python -m experiments.hardware.tpu_estimate --workdir=runs/tpu_full --batch_size=8 \\
        --length=4096 --num_heads=16 --num_householder=2 --profile=false

compiles the op ahead of time with package libtpu; nothing is run. These are estimates, to compare
two versions of the op on one chip, and no times:

* schedule: cycles of the final schedule, by the compiler's profiler, which follows it bundle by
  bundle. Traffic with the memory is missing, so it is too low where that decides (x + 1 over 256
  MiB: less than half of what the bandwidth allows). For a product of two 4096 x 4096 matrices in
  bfloat16 it is 3 to 7 per cent above what the peak of v5e, v5p and v6e allows. It is slow for
  large shapes, and aborts on some programs and always on v4; then the table says so.
* cost model: what the compiler chose its tiles by; it counts traffic and an overhead an operation,
  and knows no custom calls.
* kernels: bundles that all Pallas kernels issue, at one a cycle, counted in the final code. It
  leaves out stalls and all that is outside of kernels (the cost model has that), and reads peers'
  kernels on which the profiler aborts.
* HBM: bytes that all operations read from it and write to it, the Pallas kernels by the blocks that
  their grids move; "x least" is over arguments, outputs and a state for every 128 factors.
* memory: temporary, arguments, outputs. What is kept on the chip is not counted.

Microseconds are cycles at the clock in `compilers.tpu.GENERATIONS`, on v4 of one of a chip's two
cores, else of the chip. "chunked", "pallas_tpu" and "scan" are ``implementation="chunked"``,
``"pallas_tpu"`` and ``"recurrent"`` of the op; "interleaved" is the published form, one factor a
token in a sequence n_h times longer. Peer "tokamax" is the interleaved form by that package's Kimi
Delta Attention in Pallas, which has a decay for every channel where the op has one for a head.

Source: this project; the interleaved form is how the official kernels of
    https://arxiv.org/abs/2502.10297 compute.
Expect: fewer microseconds and less memory for chunked than for interleaved with n_h of 2 and more;
    experiments/results/tpu/ has every table.
Takes: half an hour on a busy CPU core, with libtpu; no TPU.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from deltaproduct_jax.compilers.tpu import GENERATIONS
from deltaproduct_jax.errors import require_one_of
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import begun, known_columns, write_report
from experiments.lib.bench.timing import BACKWARD, FORWARD, Shape
from experiments.lib.bench.tpu_compiler import (
    IMPLEMENTATIONS,
    PEERS,
    Compilation,
    compile_apart,
)
from experiments.lib.compilers import require_compiler, versions


@dataclasses.dataclass(frozen=True)
class EstimateConfig:
    """What is compiled."""

    batch_size: int = setting(1, "sequences B", least=1)
    length: int = setting(1024, "tokens T", least=1)
    num_heads: int = setting(4, "heads H", least=1)
    head_dim: int = setting(128, "key width K and value width V", least=1)
    num_householder: tuple[int, ...] = setting(
        (1, 2, 3), "Householder factors per token, in turn", filled=True, least=1
    )
    gated: bool = setting(True, "with a decay g")
    dtype: str = setting(
        "bfloat16", "of q, k and v: float32 or bfloat16", one_of=("float32", "bfloat16")
    )
    generations: str = setting("v5e,v6e", f"comma list of {', '.join(GENERATIONS)}")
    implementations: str = setting(
        "interleaved,chunked,scan", "comma list; ratios are to the first"
    )
    peer: str | None = setting(None, f"comma list of {', '.join(PEERS)}, or none; compiled last")
    chunk_size: int | None = setting(None, "tokens in a chunk; none: the op's choice", least=1)
    directions: str = setting(f"{FORWARD},{BACKWARD}", "comma list of what is compiled")
    profile: bool = setting(True, "with the profile of the schedule, slow for large shapes")
    timeout_s: float = setting(300.0, "seconds after which a compilation is given up", least=1)

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        for name, allowed in (
            ("generations", GENERATIONS),
            ("implementations", set(IMPLEMENTATIONS) - set(PEERS)),
            ("directions", (FORWARD, BACKWARD)),
        ):
            for entry in getattr(self, name).split(","):
                require_one_of(name, entry, allowed)
        for name in self.peers:
            require_one_of("peer", name, PEERS)
            PEERS[name].require()  # an error now, not after the first rows

    @property
    def peers(self) -> list[str]:
        """The peers, in order."""
        return self.peer.split(",") if self.peer else []

    @property
    def programs(self) -> list[str]:
        """Names of all that is compiled for one cell of the table, in order."""
        return [*self.implementations.split(","), *self.peers]


def estimate(config: EstimateConfig, generation: str, n_h: int, direction: str) -> list[dict]:
    """One row per implementation."""
    rows = []
    for implementation in config.programs:
        sizes = (config.batch_size, config.length, config.num_heads, *[config.head_dim] * 2, n_h)
        shape = Shape(*sizes, config.dtype, config.gated)
        wanted = Compilation(generation, implementation, direction, shape, config.chunk_size)
        note = None
        (found,) = compile_apart([wanted], profile=config.profile, timeout_s=config.timeout_s)
        if config.profile and "error" in found:
            note = found["error"]
            (found,) = compile_apart([wanted], profile=False, timeout_s=config.timeout_s)
        names = {"generation": generation, "num_householder": n_h, "direction": direction}
        # Of a state for every 128 factors: a chunk of the kernel.
        spans = -(-shape.T * shape.R // 128)
        found["states_bytes"] = 4 * spans * shape.B * shape.H * shape.K * shape.V
        rows.append({**names, "implementation": implementation, "profile_error": note, **found})
    return rows


HEAD = (
    "chip", "n_h", "direction", "implementation", "schedule, us", "schedule, x first",
    "kernels, us", "kernels, x first", "cost model, us", "cost model, x first", "HBM MiB",
    "x least", "temp MiB", "arguments MiB", "outputs MiB", "custom calls and collectives",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; "x first" is the ratio to the first row of the same program."""
    lines, first = [], {}
    for row in rows:
        names = [row[name] for name in ("generation", "num_householder", "direction")]
        reference = first.setdefault(tuple(names), row)
        cells = [*names, row["implementation"]]
        if "error" in row:
            cells += [row["error"], *[None] * 11]
        else:
            failed = row.get("profile_error")
            cells += [failed, None] if failed else []
            for name in ("kernel", "model") if failed else ("schedule", "kernel", "model"):
                cells += _microseconds(row, reference, name)
            cells += [f"{row['hbm_bytes'] / 2**20:.1f}", _times_least(row)]
            cells += [f"{row[f'{n}_bytes'] / 2**20:.1f}" for n in ("temp", "argument", "output")]
            # Buffers that the compiler sets aside are custom calls to it.
            calls = {n: c for n, c in row["custom_calls"].items() if n != "AllocateBuffer"}
            calls |= row.get("collectives", {})
            cells.append(", ".join(f"{count} {name}" for name, count in calls.items()) or None)
        lines.append(cells)
    return known_columns(HEAD, lines)


def _times_least(row: dict[str, Any]) -> str | None:
    """Bytes moved over those of arguments, results and states; None where these are not known."""
    if "states_bytes" not in row:
        return None
    least = sum(row[f"{name}_bytes"] for name in ("argument", "output", "states"))
    return f"{row['hbm_bytes'] / least:.2f}"


def _microseconds(
    row: dict[str, Any], reference: dict[str, Any], name: str
) -> tuple[str | None, str | None]:
    """Microseconds by one of the estimates, and how many times those of the reference."""
    cycles, base = row.get(f"{name}_cycles"), reference.get(f"{name}_cycles")
    if cycles is None:
        return None, None
    text = f"{1e6 * cycles / GENERATIONS[row['generation']].hertz:.1f}"
    return text, f"{cycles / base:.2f}" if base else None


def command(argv: Sequence[str]) -> None:
    """Compiles, prints the table, writes estimate.json and estimate.md."""
    parsed = flags.parse(argv, {"estimate": EstimateConfig}, {"default": {}})
    config = EstimateConfig(**parsed.sections["estimate"])
    require_compiler("tpu")
    rows = []
    for generation in config.generations.split(","):
        for n_h in config.num_householder:
            for direction in config.directions.split(","):
                rows += estimate(config, generation, n_h, direction)
                print(table(rows[-len(config.programs) :]), file=sys.stderr)
    installed = ", ".join([versions("tpu"), *(PEERS[name].require() for name in config.peers)])
    title = (
        f"B={config.batch_size} T={config.length} H={config.num_heads} K=V={config.head_dim}, "
        f"{config.dtype}, {'gated' if config.gated else 'ungated'}; estimates of the compiler, "
        f"nothing was run; {installed}"
    )
    clocks = {name: GENERATIONS[name].hertz for name in config.generations.split(",")}
    record = begun("hardware.tpu_estimate", argv, versions=installed)
    record |= {"hertz": clocks, "shape": title, "rows": rows}
    print(write_report(parsed.workdir, "estimate", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What estimate.md holds."""
    return [record["shape"], table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
