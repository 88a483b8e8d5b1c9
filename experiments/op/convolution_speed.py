"""How fast are the short convolutions of q, k and v, with SiLU and, of q and k, unit length?

    python -m experiments.op.convolution_speed --workdir=runs/convolution           # a CPU
    python -m experiments.op.convolution_speed --workdir=runs/convolution --preset=gpu --peer=fla
    python -m experiments.op.convolution_speed --workdir=runs/convolution --preset=gpu \\
        --estimate=v5e                                                             # no TPU needed

times one layer's three convolutions: "plain" as layers compute them where no kernel runs, "fused"
the same with one rounding (the specification of the kernels), and "triton" the kernels. On a GPU
the times that count are those of its kernels alone. ``--peer=fla`` adds flash-linear-attention's
convolution and its unit vectors. Before anything is timed, results and gradients of all inputs and
taps are held against float64. "x floor" is the time over that of every input and output moved once
at the bandwidth of an H100.

``--estimate`` runs nothing: it compiles both plain forms for a TPU, ahead of time, and counts the
bytes that they move.

Source: this project; the shapes of ``--preset=gpu`` are those of a layer of the paper's 340M model
    with n_h = 2, https://arxiv.org/abs/2502.10297.
Expect: experiments/results/gpu/convolution/ has an H200's; experiments/results/tpu/LOG.md has the
    estimates.
Takes: seconds on a CPU; minutes on a GPU with a peer; 5 minutes for an estimate, with libtpu.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from deltaproduct_jax.compilers.tpu import GENERATIONS
from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench import convolution
from experiments.lib.bench.convolution import FUSED, IMPLEMENTATIONS, KERNEL, LAYER, Convolutions
from experiments.lib.bench.device_time import time_on_device
from experiments.lib.bench.gpu_kernels import BANDWIDTH
from experiments.lib.bench.report import TIMES, markdown, shown, times, write_report
from experiments.lib.bench.timing import (
    BACKWARD,
    CHECKED_TOKENS,
    ERROR_LIMIT,
    FORWARD,
    compile_program,
    started,
    time_in_turn,
    worst_error,
)

PRESETS = {
    "default": {},
    "gpu": {
        "batch_size": 8,
        "length": 4096,
        "num_heads": 4,
        "head_dim": 128,
        "dtype": "bfloat16",
        "implementations": (LAYER, FUSED, KERNEL),
        "repeats": 20,
    },
}
DIRECTIONS = (FORWARD, BACKWARD)


@dataclasses.dataclass(frozen=True)
class ConvolutionConfig:
    """What is timed."""

    batch_size: int = setting(2, "sequences B", least=1)
    length: int = setting(256, "tokens T", least=1)
    num_heads: int = setting(2, "heads H", least=1)
    head_dim: int = setting(32, "key width K and value width V", least=1)
    num_householder: int = setting(2, "Householder factors per token", least=1)
    conv_size: int = setting(4, "taps", least=1)
    packed: bool = setting(False, "rows hold four sequences each")
    dtype: str = setting("float32", "of inputs: float32 or bfloat16")
    implementations: tuple[str, ...] = setting(
        (LAYER, FUSED), f"any of {', '.join(IMPLEMENTATIONS)}", filled=True
    )
    directions: tuple[str, ...] = setting(
        DIRECTIONS, f"any of {', '.join(DIRECTIONS)}", filled=True
    )
    repeats: int = setting(9, "timed rounds", least=1)
    budget_s: float = setting(30.0, "seconds after which no further round begins", above=0)
    peer: str | None = setting(None, "fla: flash-linear-attention too, on a GPU")
    estimate: str | None = setting(
        None, f"compile for a TPU among {', '.join(GENERATIONS)} and count bytes; nothing is run"
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        require_one_of("dtype", self.dtype, ERROR_LIMIT)
        require_one_of("peer", self.peer, [None, "fla"])
        require_one_of("estimate", self.estimate, [None, *GENERATIONS])
        for name, known in (("implementations", IMPLEMENTATIONS), ("directions", DIRECTIONS)):
            for entry in getattr(self, name):
                require_one_of(name, entry, known)

    def sizes(self, length: int | None = None) -> Convolutions:
        """Those of the convolutions, or of shorter rows."""
        return Convolutions(
            self.batch_size,
            self.length if length is None else length,
            *(self.num_heads, self.head_dim, self.num_householder, self.conv_size),
            *(self.dtype, self.packed),
        )


def measure(config: ConvolutionConfig, direction: str) -> list[dict[str, Any]]:
    """One row an implementation, each held against float64 first."""
    sizes, short = config.sizes(), config.sizes(min(config.length, CHECKED_TOKENS))
    arrays, checked = sizes.inputs(), short.inputs()
    want = convolution.exact(short, checked, direction)
    programs, errors = {}, {}
    for name in config.implementations:
        try:
            run = convolution.program(sizes, name, direction)
        except ValueError as error:
            raise ConfigError(f"implementations={name}: {error}") from error
        programs[name] = compile_program(run, arrays)
        got = jax.jit(convolution.program(short, name, direction))(checked)
        errors[name] = _checked(config, name, got, want)
    if config.peer:
        got = convolution.peer_results(short, checked, direction)
        errors["fla"] = _checked(config, "fla", got, want)
        programs["fla"] = convolution.compile_peer(sizes, arrays, direction)
    time_in_turn(programs, config.repeats, config.budget_s)
    kernels = time_on_device(programs)
    floor = 1e3 * sizes.floor_bytes(direction) / BANDWIDTH
    rows = []
    for name, entry in programs.items():
        device_ms = sum(kernels[name].values()) or None
        times_floor = device_ms and device_ms / floor
        row = {"direction": direction, "implementation": name, **entry.summary()}
        row |= {"device_ms": device_ms, "kernels_ms": kernels[name], "floor_ms": floor}
        rows.append(row | {"times_floor": times_floor, "worst_error": errors[name]})
    return rows


def _checked(config: ConvolutionConfig, name: str, got: Any, want: Any) -> float:
    error = worst_error(got, want)
    if not error <= ERROR_LIMIT[config.dtype]:
        raise ConfigError(f"{name} is wrong at {config.sizes()}: off by {error:.1e}")
    return error


HEAD = ("direction", "implementation", *TIMES, "on the GPU, ms", "x floor", "temp MiB", "error")
ESTIMATED = ("chip", "direction", "implementation", "HBM MiB", "x floor", "temp MiB")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Times, or estimates, as Markdown."""
    if "generation" in rows[0]:
        names = ("generation", "direction", "implementation")
        numbers = lambda row: (row["hbm_bytes"] / 2**20, row["times_floor"])
        lines = [
            [
                *(row[name] for name in names),
                *(f"{x:.2f}" for x in numbers(row)),
                f"{row['temp_bytes'] / 2**20:.1f}",
            ]
            for row in rows
        ]
        return markdown(ESTIMATED, lines)
    lines = [
        [
            *(row["direction"], row["implementation"], *times(row)),
            *(shown(row["device_ms"], ".3f"), shown(row["times_floor"], ".2f")),
            *(shown(row["temp_mib"], ".1f"), f"{row['worst_error']:.1e}"),
        ]
        for row in rows
    ]
    return markdown(HEAD, lines)


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes convolution.json and convolution.md."""
    parsed = flags.parse(argv, {"convolution": ConvolutionConfig}, PRESETS)
    config = ConvolutionConfig(**parsed.sections["convolution"])
    record = started("op.convolution_speed", argv, config=dataclasses.asdict(config))
    if config.estimate:
        directions = list(config.directions)
        record["rows"] = convolution.estimates(config.sizes(), config.estimate, directions)
        print(write(parsed.workdir, record))
        return
    for direction in config.directions:
        record["rows"] += measure(config, direction)
        text = write(parsed.workdir, record)  # what is measured stays, whatever comes next
    print(text)


def write(workdir: Path, record: dict[str, Any]) -> str:
    """convolution.json and convolution.md; what the latter holds."""
    sizes = ConvolutionConfig(**record["config"]).sizes()
    return write_report(
        workdir, "convolution", record, f"{sizes}; {record['machine']}", table(record["rows"])
    )


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
