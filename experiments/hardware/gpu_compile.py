"""What the compiler makes of the GPU kernels, on a machine without a GPU.

    python -m experiments.hardware.gpu_compile --workdir=runs/gpu_compile

compiles every kernel of a forward and a backward pass ahead of time for one compute capability and
reads registers a thread, bytes spilt to local memory, how many instructions in loops store or load
what was spilt (most is put by before a loop for after it), shared memory, and how many programs fit
on a multiprocessor at once. Beside them stand two floors of each kernel: the bytes of the arrays it
reads and writes, each counted once, and the floating-point operations of its products, as times at
the bandwidth and peak of an H100 (gpu_kernels.py). Nothing is run. Needs jax-triton, Triton and
jax-cuda13-plugin.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from deltaproduct_jax.files import write_file
from deltaproduct_jax.ops.kernels.triton import passes as triton_gpu
from deltaproduct_jax.settings import setting
from experiments.lib import flags
from experiments.lib.bench.gpu_kernels import PassConfig, floors, launches

# Of a multiprocessor of an H100: registers, bytes of shared memory and threads.
REGISTERS, SHARED, THREADS = 65536, 227 * 1024, 2048


@dataclasses.dataclass(frozen=True)
class CompileConfig(PassConfig):
    """What is compiled."""

    compute_capability: int = setting(90, "what it is compiled for; 90 is an H100 or H200")


def compile_kernels(config: CompileConfig, R: int, K: int) -> list[dict[str, Any]]:
    """One row a kernel.

    Raises:
        ConfigError: a package is missing, or the kernels do not take the shape.
    """
    rows = {}
    for name, arrays, outs, grid, launch, meta in launches(config, R, K):
        rows[name, meta.get("SUMMARY", False)] = {
            "kernel": name + (" (summary)" if meta.get("SUMMARY") else ""),
            "num_householder": R,
            "head_dim": K,
            "grid": list(grid),
            "warps": launch.warps,
            "stages": launch.stages,
            "columns": launch.columns,
            **floors(name, [*arrays, *outs], grid, meta),
            **_compiled(name, [*arrays, *outs], launch, meta, config.compute_capability),
        }
    return list(rows.values())


def _compiled(name: str, arrays, launch, meta, compute_capability: int) -> dict[str, Any]:
    """What Triton and the assembler say of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deltaproduct_jax.ops.kernels.triton import kernels as triton_kernels

    kernel = getattr(triton_kernels, name)
    constants = {key: value for key, value in meta.items() if key in kernel.arg_names}
    pointers = [key for key in kernel.arg_names if key not in constants]
    types = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8"}
    signature = {
        key: f"*{types[jnp.dtype(x.dtype).name]}" for key, x in zip(pointers, arrays, strict=True)
    }
    source = ASTSource(
        kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # jax-triton leaves it empty
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", compute_capability, 32),
            options={"num_warps": launch.warps, "num_stages": launch.stages},
        )
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

        def dump(what: str) -> str:
            command = [str(tool), what, str(binary)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        text, machine_code = dump("-res-usage"), dump("-sass")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    shared, threads = compiled.metadata.shared, 32 * launch.warps
    fit = (REGISTERS // (usage["REG"] * threads), SHARED // max(shared, 1), THREADS // threads)
    return {
        "registers": usage["REG"],
        "spilt_bytes": usage["STACK"] + usage["LOCAL"],
        "spills_in_loops": spills_in_loops(machine_code),
        "shared_bytes": shared,
        "programs_a_multiprocessor": min(fit),
    }


def spills_in_loops(machine_code: str) -> int:
    """Stores to local memory and loads from it between a jump back and where it leads."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", machine_code)
    code = [(int(address, 16), text) for address, text in found]
    loops = []
    for address, text in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        # The last instruction jumps to itself.
        if jump and int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    spills = [address for address, text in code if re.search(r"\b(STL|LDL)\b", text)]
    return sum(any(first <= spill <= last for first, last in loops) for spill in spills)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["n_h", "K = V", "kernel", "programs", "warps", "registers", "spilt B", "in loops"]
    head += ["shared KiB", "at once", "MB", "GFLOP", "floor ms, bytes", "floor ms, products"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["num_householder"], r["head_dim"], r["kernel"], "x".join(map(str, r["grid"]))]
        cells += [r["warps"], r["registers"], r["spilt_bytes"], r["spills_in_loops"]]
        cells += [
            f"{r['shared_bytes'] / 1024:.0f}",
            r["programs_a_multiprocessor"],
            f"{r['bytes'] / 1e6:.0f}",
        ]
        cells += [f"{r['operations'] / 1e9:.0f}", f"{r['floor_bytes_ms']:.2f}"]
        cells += [f"{r['floor_operations_ms']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def command(argv: Sequence[str]) -> None:
    """Compiles, prints the table, writes compile.json and compile.md."""
    parsed = flags.parse(argv, {"compile": CompileConfig}, {"default": {}})
    config = CompileConfig(**parsed.sections["compile"])
    os.environ[triton_gpu.COMPUTE_CAPABILITY_VARIABLE] = str(config.compute_capability)
    rows = []
    for R in config.num_householder:
        for K in config.head_dim:
            of_shape = compile_kernels(config, R, K)
            print(table(of_shape), file=sys.stderr)
            rows += of_shape
    import triton

    shape = f"{config.described()}; compute capability {config.compute_capability}, "
    shape += f"Triton {triton.__version__}"
    command_line = " ".join(["python -m experiments.hardware.gpu_compile", *argv])
    record = {"command": command_line, "shape": shape, "rows": rows}
    write_file(parsed.workdir / "compile.json", json.dumps(record, indent=1).encode() + b"\n")
    text = f"{shape}\n\n{table(rows)}\n\nCommand: `{command_line}`\n"
    write_file(parsed.workdir / "compile.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
