"""What does the compiler make of the GPU kernels? On a machine without a GPU.

    python -m experiments.hardware.gpu_compile --workdir=runs/gpu_compile

compiles every kernel of a forward and a backward pass ahead of time for one compute capability and
reads registers a thread, bytes spilt to local memory, how many instructions in loops store or load
what was spilt (most is put by before a loop for after it), shared memory, and how many programs fit
on a multiprocessor at once. Beside them stand two floors of each kernel: the bytes of the arrays it
reads and writes, each counted once, and the floating-point operations of its products, as times at
the bandwidth and peak of an H100 (`experiments.lib.bench.gpu_kernels`). Nothing is run.

Source: this project.
Expect: in bfloat16 nothing spilt, but 24 bytes of gradients with n_h = 1 and K = V = 64; in float32
    most kernels spill; experiments/results/gpu/compile/ has the tables.
Takes: 3 minutes on a CPU; jax-triton, Triton and jax-cuda13-plugin (extra "gpu"), no GPU.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from deltaproduct_jax.compilers.gpu import kernel_resources
from deltaproduct_jax.ops.kernels.triton import passes
from deltaproduct_jax.settings import setting
from experiments.lib import flags
from experiments.lib.bench.gpu_kernels import PassConfig, floors, launches
from experiments.lib.bench.report import begun, markdown, write_report


@dataclasses.dataclass(frozen=True)
class CompileConfig(PassConfig):
    """What is compiled."""

    compute_capability: int = setting(90, "what it is compiled for; 90 is an H100 or H200")


def compile_kernels(config: CompileConfig, R: int, K: int) -> list[dict[str, Any]]:
    """One row a kernel.

    Raises:
        ConfigError: a package is missing, or the kernels do not take the shape.
    """
    calls = launches(config, R, K)  # which says first what is missing
    from deltaproduct_jax.ops.kernels.triton import kernels

    rows = {}
    for name, arrays, outs, grid, launch, meta in calls:
        rows[name, meta.get("SUMMARY", False)] = {
            "kernel": name + (" (summary)" if meta.get("SUMMARY") else ""),
            "num_householder": R,
            "head_dim": K,
            "grid": list(grid),
            "warps": launch.warps,
            "stages": launch.stages,
            "columns": launch.columns,
            **floors(name, [*arrays, *outs], grid, meta),
            **kernel_resources(
                getattr(kernels, name),
                [*arrays, *outs],
                meta,
                warps=launch.warps,
                stages=launch.stages,
                compute_capability=config.compute_capability,
                registers=launch.registers,
            ),
        }
    return list(rows.values())


HEAD = (
    "n_h", "K = V", "kernel", "programs", "warps", "registers", "spilt B", "in loops", "shared KiB",
    "at once", "MB", "GFLOP", "floor ms, bytes", "floor ms, products",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        [
            *(r["num_householder"], r["head_dim"], r["kernel"], "x".join(map(str, r["grid"]))),
            *(r["warps"], r["registers"], r["spilt_bytes"], r["spills_in_loops"]),
            *(f"{r['shared_bytes'] / 1024:.0f}", r["programs_a_multiprocessor"]),
            *(f"{r['bytes'] / 1e6:.0f}", f"{r['operations'] / 1e9:.0f}"),
            *(f"{r['floor_bytes_ms']:.2f}", f"{r['floor_operations_ms']:.2f}"),
        ]
        for r in rows
    ]
    return markdown(HEAD, lines)


def command(argv: Sequence[str]) -> None:
    """Compiles, prints the table, writes compile.json and compile.md."""
    parsed = flags.parse(argv, {"compile": CompileConfig}, {"default": {}})
    config = CompileConfig(**parsed.sections["compile"])
    os.environ[passes.COMPUTE_CAPABILITY_VARIABLE] = str(config.compute_capability)
    rows = []
    for R in config.num_householder:
        for K in config.head_dim:
            of_shape = compile_kernels(config, R, K)
            print(table(of_shape), file=sys.stderr)
            rows += of_shape
    import triton

    shape = f"{config.described()}; compute capability {config.compute_capability}, "
    shape += f"Triton {triton.__version__}"
    record = begun("hardware.gpu_compile", argv, shape=shape, rows=rows)
    print(write_report(parsed.workdir, "compile", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What compile.md holds."""
    return [record["shape"], table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
