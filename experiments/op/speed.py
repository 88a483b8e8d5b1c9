"""How fast is the op, and how accurate: any implementations at one shape, in one process.

    python -m experiments.op.speed --workdir=runs/speed
    python -m experiments.op.speed --workdir=runs/plain --peer=plain
    python -m experiments.op.speed --workdir=runs/speed_gpu --preset=gpu

Each implementation, and the peer, is first held against the recurrence in float64 on two sequences
of 256 tokens, and refused where it is wrong. The programs then run in turn; the table shows median
[min - max] of a call, compile time apart, the temporary memory that the compiler reports, and the
ratio to the first implementation named, or to the peer "plain" where there is one. On a GPU it also
shows the time on the GPU itself, the sum of the kernels that the profiler saw; the ratio is of
those where there are some.

With a peer of PyTorch ours are compiled in a process of their own before: where FlashQLA has been
loaded, Triton has failed to compile them (results/gpu/LOG.md), but it finds what it has compiled.
Such a process may not end by itself once its table is there.

``--directions=step`` times decoding instead: `delta_product_step`, whatever ``--implementations``
says, from token to token in one program; the table has the time of one token.

Source: this project; https://arxiv.org/abs/2502.10297 times training of whole models.
Expect: on a CPU, forward and backward, the chunked form several times faster than a plain scan and
    errors below 1e-6; experiments/results/op/ and results/gpu/ have the tables.
Takes: 2 minutes on two CPU cores; the third command needs a GPU, PyTorch and the peers.
"""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.ops.selection import AVAILABLE
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.device_time import time_on_device
from experiments.lib.bench.peers import fla, flashqla
from experiments.lib.bench.peers.jax_packages import PACKAGES, PLAIN, peer_op
from experiments.lib.bench.report import TIMES, collect, known_columns, shown, times, write_report
from experiments.lib.bench.timing import (
    BACKWARD,
    CHECKED_TOKENS,
    DECODING_ROUNDS,
    ERROR_LIMIT,
    FORWARD,
    STEP,
    Compiled,
    Shape,
    by_token,
    checked_error,
    compile_program,
    decoding,
    exact_results,
    program,
    started,
    time_in_turn,
)
from experiments.lib.bench.training_steps import apart
from experiments.lib.field_flags import show
from experiments.lib.figures.benchmarks import draw_speed
from experiments.lib.figures.style import SECTION, Look

# The gradient of the recurrence keeps several states per token: more sequences of 16 heads of 128
# do not fit on a TPU of 16 GB.
CHECKED_SEQUENCES = 2
OF_TORCH = ("fla", *flashqla.NAMES)
TOKENS_OF_DECODING = 8
PRESETS = {
    "default": {},
    "gpu": {
        "batch_size": (8, 1),
        "length": (4096, 32768),
        "num_heads": 16,
        "head_dim": 128,
        "gated": None,
        "dtype": "bfloat16",
        "implementations": "triton",
        "peer": "flashqla,flashqla_interleaved,fla",
    },
}


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """What is timed."""

    batch_size: tuple[int, ...] = setting((1,), "sequences B, in turn", filled=True, least=1)
    length: tuple[int, ...] = setting(
        (2048,), "tokens T, one for each batch size", filled=True, least=1
    )
    num_heads: int = setting(4, "heads H", least=1)
    num_v_heads: int | None = setting(None, "value heads Hv, a multiple of H; none: H", least=1)
    head_dim: int = setting(64, "key width K", least=1)
    value_dim: int | None = setting(None, "value width V; none: head_dim", least=1)
    num_householder: tuple[int, ...] = setting(
        (1, 2, 3), "Householder factors per token, in turn", filled=True, least=1
    )
    gated: bool | None = setting(True, "with a decay g; none: with, then without")
    dtype: str = setting("float32", "float32 or bfloat16", one_of=ERROR_LIMIT)
    implementations: str = setting(
        "recurrent,chunked,auto", "comma list; auto is implementation=None, ratios are to the first"
    )
    chunk_size: int | None = setting(None, "tokens in a chunk; none: the op's choice")
    directions: str = setting(f"{FORWARD},{BACKWARD}", "comma list of what is timed; or step")
    repeats: int = setting(9, "timed rounds", least=1)
    budget_s: float = setting(
        60.0, "seconds after which no further round of a case begins", above=0
    )
    peer: str | None = setting(
        None,
        "comma list of what to time too: plain, a scan over tokens that is not ours, and ratios "
        "are to it; the packages jla (jax-linear-attention) and ejkernel; or, on a GPU in "
        "bfloat16, fla (flash-linear-attention), flashqla (n_h = 1) and flashqla_interleaved "
        "(n_h > 1)",
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if self.value_heads % self.num_heads:
            raise ConfigError(
                f"num_v_heads={self.num_v_heads} must be a multiple of num_heads={self.num_heads}"
            )
        if len(self.length) != len(self.batch_size):
            raise ConfigError(
                f"length={show(self.length)} must be as many as batch_size={show(self.batch_size)}"
            )
        for name in self.names:
            require_one_of("implementations", name, [*AVAILABLE, "auto"])
        for direction in self.directions.split(","):
            require_one_of("directions", direction, [FORWARD, BACKWARD, STEP])
        for name in self.peers:
            require_one_of("peer", name, [PLAIN, *OF_TORCH, *PACKAGES])
        for name in set(self.peers) & set(OF_TORCH):
            if self.dtype != "bfloat16":
                raise ConfigError(f"peer={name} refuses dtype={self.dtype!r}; give dtype=bfloat16")
            fla.require_packages(flashqla.PEER if name in flashqla.NAMES else fla.FLA)
        if STEP in self.directions.split(",") and set(self.peers) - {"fla"}:
            raise ConfigError(f"peer={self.peer!r} has no directions=step; only fla has")
        if self.peers and self.value_heads != self.num_heads:
            raise ConfigError(
                f"num_v_heads={self.num_v_heads} with peer={self.peer!r}: peers are timed "
                f"with as many as num_heads={self.num_heads}"
            )
        for name in set(self.peers) - set(OF_TORCH):
            peer_op(name)  # an error now, not after the first rows

    @property
    def gates(self) -> list[bool]:
        """Whether with a decay, in order."""
        return [True, False] if self.gated is None else [self.gated]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """B and T, in order."""
        return list(zip(self.batch_size, self.length, strict=True))

    @property
    def widths(self) -> tuple[int, int]:
        """K and V."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim

    @property
    def value_heads(self) -> int:
        """Hv."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def names(self) -> list[str]:
        """The implementations, in order."""
        return self.implementations.split(",")

    @property
    def peers(self) -> list[str]:
        """The peers, in order."""
        return self.peer.split(",") if self.peer else []


def measure(
    config: SpeedConfig, size: tuple[int, int], gated: bool, n_h: int, direction: str
) -> list[dict[str, Any]]:
    """One row an implementation at one shape; with what differs from others of the record."""
    varied = {"batch_size": size[0], "length": size[1]} if len(config.sizes) > 1 else {}
    varied |= {"gates": "yes" if gated else "no"} if len(config.gates) > 1 else {}
    programs, errors = _prepared(config, size, gated, n_h, direction)
    time_in_turn(programs, config.repeats, config.budget_s)
    kernels = time_on_device(programs)
    summaries = {name: entry.summary() for name, entry in programs.items()}
    taken = {name: sum(kernels[name].values()) or x["median_ms"] for name, x in summaries.items()}
    first = next(iter(taken.values()))
    return [
        {
            **varied,
            "num_householder": n_h,
            "direction": direction,
            "implementation": name,
            **summary,
            "device_ms": sum(kernels[name].values()) or None,
            "kernels_ms": {kernel: round(x, 4) for kernel, x in kernels[name].items()},
            "times_faster_than_first": first / taken[name],
            "worst_error": errors[name],
        }
        for name, summary in summaries.items()
    ]


Case = tuple[tuple[int, int], bool, int, str]
Programs = tuple[dict[str, Compiled], dict[str, float]]


def _compile_ours(config: SpeedConfig, cases: Sequence[Case]) -> None:
    """Leaves our kernels where Triton finds them again."""
    for case in cases:
        _prepared(dataclasses.replace(config, peer=None), *case)


def _prepared(
    config: SpeedConfig, size: tuple[int, int], gated: bool, n_h: int, direction: str
) -> Programs:
    """What is timed in one case, by name, and its error."""
    sizes = (*size, config.num_heads, *config.widths)
    shape = Shape(*sizes, n_h, config.dtype, gated, config.value_heads)
    prepare = _decoding if direction == STEP else _whole_sequences
    return prepare(config, shape, direction)


def _whole_sequences(config: SpeedConfig, shape: Shape, direction: str) -> Programs:
    """The same for whole sequences."""
    arrays = shape.inputs()
    sizes = {"B": min(shape.B, CHECKED_SEQUENCES), "T": min(shape.T, CHECKED_TOKENS)}
    short = dataclasses.replace(shape, **sizes)
    checked = short.inputs()
    want = exact_results(checked, direction)
    programs, errors = {}, {}
    peers = [name for name in config.peers if name not in OF_TORCH]
    for name in sorted([*config.names, *peers], key=lambda name: name != PLAIN):  # ratios to it
        implementation = None if name == "auto" else name
        if name in peers:
            implementation = peer_op(name)
        function = program(implementation, direction, config.chunk_size)
        # First, as the check may compile the same program.
        programs[name] = compile_program(function, arrays)
        errors[name] = checked_error(name, short, jax.jit(function)(checked), want)
    for name in config.peers:
        if name not in OF_TORCH or (name in flashqla.NAMES and name != flashqla.NAMES[shape.R > 1]):
            continue
        peer = flashqla if name in flashqla.NAMES else fla
        got = peer.peer_results(short, checked, direction)
        errors[name] = checked_error(name, short, got, want)
        programs[name] = peer.compile_peer(shape, arrays, direction)
    return programs, errors


def _decoding(config: SpeedConfig, shape: Shape, direction: str) -> Programs:
    """The same for one token after another, from a state of zeros."""
    del direction
    shape = dataclasses.replace(shape, T=TOKENS_OF_DECODING)
    arrays = shape.inputs()
    again = {name: jnp.concatenate(DECODING_ROUNDS * [x], axis=1) for name, x in arrays.items()}
    want = exact_results(again, FORWARD)
    tokens = by_token(arrays)
    ours = compile_program(decoding, tokens, calls=DECODING_ROUNDS * shape.T)
    programs, errors = {STEP: ours}, {STEP: checked_error(STEP, shape, ours.run(), want)}
    if config.peer:
        programs["fla"] = fla.compile_peer_decoding(shape, tokens)
        errors["fla"] = checked_error("fla", shape, fla.to_numpy(programs["fla"].run()), want)
    return programs, errors


HEAD = (
    "B",
    "T",
    "gates",
    "n_h",
    "direction",
    "implementation",
    *TIMES,
    "on the GPU, ms",
    "x faster",
    "compile s",
    "temp MiB",
    "error",
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        [
            *(row.get(name) for name in ("batch_size", "length", "gates")),
            *(row[name] for name in ("num_householder", "direction", "implementation")),
            *times(row),
            shown(row.get("device_ms"), ".3f"),
            *(f"{row['times_faster_than_first']:.2f}", f"{row['compile_s']:.1f}"),
            *(shown(row["temp_mib"], ".1f"), f"{row['worst_error']:.1e}"),
        ]
        for row in rows
    ]
    return known_columns(HEAD, lines)


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes speed.json and speed.md, draws speed."""
    parsed = flags.parse(argv, {"speed": SpeedConfig, **SECTION}, PRESETS)
    config = SpeedConfig(**parsed.sections["speed"])
    look = Look(**parsed.sections["figures"])
    K, V = config.widths
    title = (
        f"{' and '.join(f'B={B} T={T}' for B, T in config.sizes)} H={config.num_heads} "
        f"{'' if config.value_heads == config.num_heads else f'Hv={config.value_heads} '}"
        f"{f'K=V={K}' if K == V else f'K={K} V={V}'}, "
        f"{config.dtype}, {' and '.join('gated' if x else 'ungated' for x in config.gates)}"
    )
    directions = config.directions.split(",")
    cases = list(itertools.product(config.sizes, config.gates, config.num_householder, directions))
    if set(config.peers) & set(OF_TORCH):
        apart(_compile_ours, config, cases)  # before this process takes memory of a GPU
    record = started("op.speed", argv, shape=title)
    measured = (measure(config, *case) for case in cases)
    write = lambda record: write_report(parsed.workdir, "speed", record, page)
    text = collect(record, measured, table, write)
    draw_speed(record["rows"], parsed.workdir / "speed", title, look)
    print(text)


def page(record: Mapping[str, Any]) -> list[str]:
    """What speed.md holds."""
    errors = (
        f"Errors: the worst of the results, against float64, on {CHECKED_SEQUENCES} sequences of "
        f"{CHECKED_TOKENS} tokens at most ({DECODING_ROUNDS * TOKENS_OF_DECODING} of decoding)."
    )
    return [f"{record['shape']}; {record['machine']}", table(record["rows"]), errors]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
