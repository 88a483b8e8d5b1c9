"""How long each GPU kernel takes, alone, by how it is launched: what `triton_tiling` was chosen by.

    python -m experiments.hardware.gpu_launches --workdir=runs/gpu_launches --num_householder=2 \
        --variants=4:2:64,4:3:32,8:2:64

times every kernel of a forward and a backward pass as the tiling launches it, then by each of the
variants. A variant is warps:stages:columns, or, for `gradients`, warps:stages:columns:keys; the
kernel `prepare` has neither stages nor columns.
Inputs are random numbers of the right shapes, which no kernel's time depends on. Needs a GPU.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.files import write_file
from deltaproduct_jax.ops.kernels.triton import passes as triton_gpu
from deltaproduct_jax.ops.kernels.triton import tiling as triton_tiling
from deltaproduct_jax.ops.kernels.triton.tiling import Launch
from deltaproduct_jax.settings import setting
from experiments.lib import flags
from experiments.lib.bench.gpu_kernels import KernelCall, PassConfig, floors, launches
from experiments.lib.bench.timing import machine

KERNELS = ("prepare", "walk", "errors", "walk_back", "gradients")


@dataclasses.dataclass(frozen=True)
class LaunchesConfig(PassConfig):
    """What is timed."""

    head_dim: tuple[int, ...] = setting((128,), "key width K and value width V, in turn")
    kernels: tuple[str, ...] = setting(KERNELS, "which")
    variants: tuple[str, ...] = setting(
        (), "warps:stages:columns[:keys], beside what the tiling says"
    )
    repeats: int = setting(10, "calls a measurement; the least and the most of three are shown")

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        for name in self.kernels:
            require_one_of("kernels", name, KERNELS)
        for text in self.variants:
            as_launch(text)
        require_at_least("repeats", self.repeats, 1)


def as_launch(text: str) -> Launch:
    """Of warps:stages:columns, or warps:stages:columns:keys.

    Raises:
        ConfigError: it is something else.
    """
    parts = text.split(":")
    sizes = [int(part) for part in parts if part.isdecimal()]
    powers = sizes[:1] + sizes[2:]
    is_launch = len(sizes) == len(parts) in (3, 4)
    if not is_launch or any(n < 1 or n & (n - 1) for n in powers):
        raise ConfigError(
            f"variants={text!r} is not warps:stages:columns or warps:stages:columns:keys, such as "
            "4:2:64; all but the stages are powers of two"
        )
    return Launch(*sizes)


def one_launch(config: PassConfig, R: int, K: int, kernel: str, launch: Launch | None):
    """The call of a kernel as the tiling launches it, or by ``launch``."""
    tiling_for = triton_tiling.tiling_for

    def changed(*args, **sizes):
        tiling = tiling_for(*args, **sizes)
        return dataclasses.replace(tiling, **{kernel: launch}) if launch else tiling

    triton_tiling.tiling_for = changed
    try:
        calls = [call for call in launches(config, R, K) if call.name == kernel]
    finally:
        triton_tiling.tiling_for = tiling_for
    return calls[-1]  # after those of a summary


def measure(call: KernelCall, repeats: int) -> tuple[float, float]:
    """Least and most of three means over ``repeats`` calls, in milliseconds."""

    def random(i: int, x: jax.ShapeDtypeStruct):
        # Small, so that nothing overflows on its way through the chunks.
        return (0.05 * jax.random.normal(jax.random.key(i), x.shape)).astype(x.dtype)

    arrays = [jax.jit(random, static_argnums=(1,))(i, x) for i, x in enumerate(call.arrays)]

    @jax.jit
    def run(arrays):
        return triton_gpu.call(call.name, arrays, call.outs, call.grid, call.launch, meta=call.meta)

    jax.block_until_ready([run(arrays) for _ in range(2)])
    means = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(repeats):
            results = run(arrays)
        jax.block_until_ready(results)
        means.append(1e3 * (time.perf_counter() - began) / repeats)
    return min(means), max(means)


def rows_of(config: LaunchesConfig, R: int, K: int, kernel: str) -> list[dict[str, Any]]:
    """Of one kernel, as the tiling launches it and by every variant."""
    rows = []
    for launch in (None, *map(as_launch, config.variants)):
        call = one_launch(config, R, K, kernel, launch)
        floor = floors(kernel, [*call.arrays, *call.outs], call.grid, call.meta)
        row = {
            **{"kernel": kernel, "num_householder": R, "head_dim": K, "chosen": launch is None},
            **dataclasses.asdict(call.launch),
            "floor_ms": max(floor["floor_bytes_ms"], floor["floor_operations_ms"]),
        }
        try:
            row["ms"], row["most_ms"] = measure(call, config.repeats)
        except Exception as error:  # most often too little shared memory for a variant
            if launch is None:
                raise
            row["error"] = str(error).splitlines()[0][:100]
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["n_h", "K = V", "kernel", "warps", "stages", "columns", "keys", "ms"]
    head += ["floor, of an H100"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["num_householder"], r["head_dim"], r["kernel"] + " (chosen)" * r["chosen"]]
        cells += [r["warps"], r["stages"], r["columns"] or "-", r["keys"] or "-"]
        if "error" in r:
            cells += [r["error"], f"{r['floor_ms']:.2f}"]
        else:
            cells += [f"{r['ms']:.2f} - {r['most_ms']:.2f}"]
            cells += [f"{r['floor_ms']:.2f} ({r['floor_ms'] / r['ms']:.0%})"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def command(argv: Sequence[str]) -> None:
    """Times, prints the table, writes launches.json and launches.md."""
    parsed = flags.parse(argv, {"launches": LaunchesConfig}, {"default": {}})
    config = LaunchesConfig(**parsed.sections["launches"])
    if jax.default_backend() != "gpu":
        raise ConfigError(f"gpu_launches needs a GPU; JAX runs on {jax.default_backend()}")
    rows = []
    for R in config.num_householder:
        for K in config.head_dim:
            for kernel in config.kernels:
                rows += rows_of(config, R, K, kernel)
                print(table(rows[-1 - len(config.variants) :]), file=sys.stderr)
    command_line = " ".join(["python -m experiments.hardware.gpu_launches", *argv])
    record = {"command": command_line, "machine": machine(), "shape": config.described()}
    text = json.dumps({**record, "rows": rows}, indent=1)
    write_file(parsed.workdir / "launches.json", text.encode() + b"\n")
    text = f"{config.described()}; {machine()}\n\n{table(rows)}\n\nCommand: `{command_line}`\n"
    write_file(parsed.workdir / "launches.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
