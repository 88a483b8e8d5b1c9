"""How long does each Triton kernel take, by how it is launched? The tiling was chosen by it.

    python -m experiments.hardware.gpu_launches --workdir=runs/gpu_launches --num_householder=2 \
        --variants=4:2:64,4:3:32,8:2:64

times every kernel of a forward and a backward pass in Triton as the tiling launches it, then by
each of the variants, also for shapes that the kernels in Gluon or of narrow heads run on this GPU.
A variant is warps:stages:columns, or, for `gradients`, warps:stages:columns:keys; the kernel
`prepare` has neither stages nor columns.
Inputs are random numbers of the right shapes, which no kernel's time depends on.

Source: this project.
Expect: the tiling's own launch among the fastest; experiments/results/gpu/launches.md has float32.
Takes: about a minute a variant on a GPU, most of it compiling.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from deltaproduct_jax.settings import setting
from experiments.lib import flags
from experiments.lib.bench.gpu_kernels import PassConfig, as_launch, call_of, floors, time_call
from experiments.lib.bench.report import begun, markdown, write_report
from experiments.lib.bench.timing import machine, require_gpu

KERNELS = ("prepare", "walk", "errors", "walk_back", "gradients")


@dataclasses.dataclass(frozen=True)
class LaunchesConfig(PassConfig):
    """What is timed."""

    head_dim: tuple[int, ...] = setting(
        (128,), "key width K and value width V, in turn", filled=True, least=1
    )
    kernels: tuple[str, ...] = setting(
        KERNELS, f"some of {', '.join(KERNELS)}", filled=True, one_of=KERNELS
    )
    variants: tuple[str, ...] = setting(
        (), "warps:stages:columns[:keys], beside what the tiling says"
    )
    repeats: int = setting(
        10, "calls a measurement; the least and the most of three are shown", least=1
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        for text in self.variants:
            as_launch(text)


def rows_of(config: LaunchesConfig, R: int, K: int, kernel: str) -> list[dict[str, Any]]:
    """Of one kernel, as the tiling launches it and by every variant."""
    rows = []
    for launch in (None, *map(as_launch, config.variants)):
        call = call_of(config, R, K, kernel, launch)
        floor = floors(kernel, [*call.arrays, *call.outs], call.grid, call.meta)
        row = {
            **{"kernel": kernel, "num_householder": R, "head_dim": K, "chosen": launch is None},
            **dataclasses.asdict(call.launch),
            "floor_ms": max(floor["floor_bytes_ms"], floor["floor_operations_ms"]),
        }
        try:
            row["ms"], row["most_ms"] = time_call(call, config.repeats)
        except Exception as error:  # most often too little shared memory for a variant
            if launch is None:
                raise
            row["error"] = str(error).splitlines()[0][:100]
        rows.append(row)
    return rows


HEAD = (
    "n_h", "K = V", "kernel", "chosen", "warps", "stages", "columns", "keys", "ms", "most ms",
    "floor ms of an H100", "floor, %",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = []
    for r in rows:
        cells = [r["num_householder"], r["head_dim"], r["kernel"], "yes" if r["chosen"] else "no"]
        cells += [r["warps"], r["stages"], r["columns"] or None, r["keys"] or None]
        if "error" in r:
            cells += [r["error"], None, f"{r['floor_ms']:.2f}", None]
        else:
            cells += [f"{r['ms']:.2f}", f"{r['most_ms']:.2f}", f"{r['floor_ms']:.2f}"]
            cells += [f"{100 * r['floor_ms'] / r['ms']:.0f}"]
        lines.append(cells)
    return markdown(HEAD, lines)


def command(argv: Sequence[str]) -> None:
    """Times, prints the table, writes launches.json and launches.md."""
    parsed = flags.parse(argv, {"launches": LaunchesConfig}, {"default": {}})
    config = LaunchesConfig(**parsed.sections["launches"])
    require_gpu("gpu_launches")
    rows = []
    for R in config.num_householder:
        for K in config.head_dim:
            for kernel in config.kernels:
                rows += rows_of(config, R, K, kernel)
                print(table(rows[-1 - len(config.variants) :]), file=sys.stderr)
    record = begun("hardware.gpu_launches", argv, machine=machine())
    record |= {"shape": config.described(), "rows": rows}
    print(write_report(parsed.workdir, "launches", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What launches.md holds."""
    return [f"{record['shape']}; {record['machine']}", table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
