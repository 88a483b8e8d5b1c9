"""How fast are the short convolutions of q, k and v, with SiLU and, of q and k, unit length?

    python -m experiments.op.convolution_speed --workdir=runs/convolution           # a CPU
    python -m experiments.op.convolution_speed --workdir=runs/convolution --preset=gpu --peer=fla
    python -m experiments.op.convolution_speed --workdir=runs/convolution --preset=tpu  # no TPU

times one layer's three convolutions: "plain" as layers compute them where no kernel runs, "fused"
the same with one rounding (the specification of the kernels), and "triton" and "pallas_tpu" the
kernels. On a GPU the times that count are those of its kernels alone. ``--peer=fla`` adds
flash-linear-attention's convolution and its unit vectors. Before anything is timed, results and
gradients of all inputs and taps are held against float64. "x floor" is the time over that of every
input and output moved once at the bandwidth of an H100.

``--estimate``, as of ``--preset=tpu``, runs nothing: it compiles for a TPU, ahead of time. "Memory"
is the time of the bytes that a program moves at the published bandwidth, "kernels" that of the
bundles that its Pallas kernels issue, at one a cycle, without stalls. Kernels take the larger of
both, about. XLA's own operations take at least that of their bytes; "cost model" is by what XLA
chose their tiles, and knows no kernels.

Source: this project; the shapes of ``--preset=gpu`` are those of a layer of the paper's 340M model
    with n_h = 2, https://arxiv.org/abs/2502.10297.
Expect: experiments/results/gpu/convolution/ has an H200's; experiments/results/tpu/LOG.md has the
    estimates.
Takes: seconds on a CPU; minutes on a GPU with a peer; 2 minutes for an estimate, with libtpu.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from deltaproduct_jax.compilers.topologies import CHIPS
from deltaproduct_jax.compilers.tpu import GENERATIONS
from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench import convolution
from experiments.lib.bench.convolution import (
    FUSED,
    GPU_KERNEL,
    IMPLEMENTATIONS,
    LAYER,
    TPU_KERNEL,
    Convolutions,
)
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

DIRECTIONS = (FORWARD, BACKWARD)
ESTIMATES = (LAYER, FUSED, TPU_KERNEL)  # of what a TPU's compiler can compile
PRESETS = {
    "default": {},
    "gpu": {
        "batch_size": 8,
        "length": 4096,
        "num_heads": 4,
        "head_dim": 128,
        "dtype": "bfloat16",
        "implementations": (LAYER, FUSED, GPU_KERNEL),
        "repeats": 20,
    },
    "tpu": {
        "batch_size": 8,
        "length": 4096,
        "num_heads": 4,
        "head_dim": 128,
        "dtype": "bfloat16",
        "implementations": ESTIMATES,
        "repeats": 20,
        "estimate": "v5e",
    },
}


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
    dtype: str = setting("float32", "of inputs: float32 or bfloat16", one_of=ERROR_LIMIT)
    implementations: tuple[str, ...] = setting(
        (LAYER, FUSED), f"any of {', '.join(IMPLEMENTATIONS)}", filled=True
    )
    directions: tuple[str, ...] = setting(
        DIRECTIONS, f"any of {', '.join(DIRECTIONS)}", filled=True, one_of=DIRECTIONS
    )
    repeats: int = setting(9, "timed rounds", least=1)
    budget_s: float = setting(30.0, "seconds after which no further round begins", above=0)
    peer: str | None = setting(None, "fla: flash-linear-attention too, on a GPU", one_of=("fla",))
    estimate: str | None = setting(
        None,
        f"compile for a TPU among {', '.join(GENERATIONS)}; nothing is run",
        one_of=GENERATIONS,
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        runs = IMPLEMENTATIONS if self.estimate is None else ESTIMATES
        for entry in self.implementations:
            require_one_of("implementations", entry, runs)

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
        programs[name] = compile_program(_program(sizes, name, direction), arrays)
        got = jax.jit(convolution.layer_program(short, name, direction))(checked)
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


def _program(sizes: Convolutions, name: str, direction: str) -> Callable[..., Any]:
    try:
        return convolution.layer_program(sizes, name, direction)
    except ValueError as error:
        raise ConfigError(f"implementations={name}: {error}") from error


def _checked(config: ConvolutionConfig, name: str, got: Any, want: Any) -> float:
    error = worst_error(got, want)
    if not error <= ERROR_LIMIT[config.dtype]:
        raise ConfigError(f"{name} is wrong at {config.sizes()}: off by {error:.1e}")
    return error


HEAD = ("direction", "implementation", *TIMES, "on the GPU, ms", "x floor", "temp MiB", "error")
ESTIMATED = (
    "chip", "direction", "implementation", "HBM MiB", "x floor", "memory, us", "kernels, us",
    "cost model, us", "temp MiB",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Times, or estimates, as Markdown."""
    if "generation" in rows[0]:
        return markdown(ESTIMATED, [_estimated(row) for row in rows])
    lines = [
        [
            *(row["direction"], row["implementation"], *times(row)),
            *(shown(row["device_ms"], ".3f"), shown(row["times_floor"], ".2f")),
            *(shown(row["temp_mib"], ".1f"), f"{row['worst_error']:.1e}"),
        ]
        for row in rows
    ]
    return markdown(HEAD, lines)


def _estimated(row: dict[str, Any]) -> list[str | None]:
    generation, hertz = row["generation"], GENERATIONS[row["generation"]].hertz
    cycles = lambda name: shown(row[name] and 1e6 * row[name] / hertz, ".0f")
    return [
        *(generation, row["direction"], row["implementation"]),
        *(f"{row['hbm_bytes'] / 2**20:.0f}", f"{row['times_floor']:.2f}"),
        f"{1e6 * row['hbm_bytes'] / CHIPS[generation].bandwidth:.0f}",
        *(cycles("kernel_cycles"), cycles("model_cycles")),
        f"{row['temp_bytes'] / 2**20:.1f}",
    ]


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes convolution.json and convolution.md."""
    parsed = flags.parse(argv, {"convolution": ConvolutionConfig}, PRESETS)
    config = ConvolutionConfig(**parsed.sections["convolution"])
    record = started("op.convolution_speed", argv, config=dataclasses.asdict(config))
    if config.estimate:
        for name in config.implementations:  # an error now, not after the first rows
            _program(config.sizes(), name, FORWARD)
        wanted = config.implementations, config.directions
        rows = ([row] for row in convolution.estimates(config.sizes(), config.estimate, *wanted))
    else:
        rows = (measure(config, direction) for direction in config.directions)
    for found in rows:
        record["rows"] += found
        # What is measured stays, whatever comes next.
        text = write_report(parsed.workdir, "convolution", record, page)
    print(text)


def page(record: Mapping[str, Any]) -> list[str]:
    """What convolution.md holds."""
    sizes = ConvolutionConfig(**record["config"]).sizes()
    return [f"{sizes}; {record['machine']}", table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
