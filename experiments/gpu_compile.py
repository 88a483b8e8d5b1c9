"""What the compiler makes of the GPU kernels, on a machine without a GPU.

    python -m experiments.gpu_compile --workdir=runs/gpu_compile

compiles every kernel of a forward and a backward pass ahead of time for one compute capability and
reads registers a thread, bytes spilt to local memory, shared memory, and how many programs fit on a
multiprocessor at once. Beside them stand two floors of each kernel: the bytes of the arrays that it
reads and writes, each counted once, and the floating-point operations of its products; at the
bandwidth and peak of an H100 (3.35 TB/s; 989 TFLOP/s in bfloat16) they are the times below which it
cannot come. Nothing is run. Needs jax-triton, Triton and jax-cuda13-plugin.
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

import jax
import jax.numpy as jnp

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.kernels import triton_gpu
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.tiling import default_span
from deltaproduct_jax.settings import setting
from deltaproduct_jax.training.records import write_file
from experiments import flags

# Of an H100: bytes and bfloat16 operations a second; registers, bytes of shared memory and threads
# of a multiprocessor.
BANDWIDTH, PEAK = 3.35e12, 989e12
REGISTERS, SHARED, THREADS = 65536, 227 * 1024, 2048


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What is compiled."""

    batch_size: int = setting(8, "sequences B")
    length: int = setting(4096, "tokens T")
    num_heads: int = setting(16, "heads H")
    head_dim: tuple[int, ...] = setting((64, 128, 256), "key width K and value width V, in turn")
    num_householder: tuple[int, ...] = setting((1, 2, 3), "Householder factors a token, in turn")
    dtype: str = setting("bfloat16", "of q, k and v: float32, float16 or bfloat16")
    gated: bool = setting(True, "with a decay g")
    compute_capability: int = setting(90, "what it is compiled for; 90 is an H100 or H200")

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("batch_size", "length", "num_heads"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("head_dim", "num_householder"):
            for size in getattr(self, name):
                require_at_least(name, size, 1)
        require_one_of("dtype", self.dtype, ["bfloat16", "float16", "float32"])


def compile_kernels(config: CompileConfig, R: int, K: int) -> list[dict[str, Any]]:
    """One row a kernel.

    Raises:
        ConfigError: a package is missing, or the kernels do not take the shape.
    """
    reason = kernels.reason_against(
        "triton",
        **{"dtype": config.dtype, "B": config.batch_size, "T": config.length, "R": R, "K": K},
        **{"V": K, "H": config.num_heads, "Hv": config.num_heads, "precision": None},
    )
    if reason is not None:
        raise ConfigError(f"implementation triton cannot run R={R}, K=V={K}: {reason}")
    launches, call = [], triton_gpu.call

    def record(name, arrays, outs, grid, launch, *, meta):
        launches.append((name, [*arrays, *outs], grid, launch, meta))
        return call(name, arrays, outs, grid, launch, meta=meta)

    triton_gpu.call = record
    try:
        _lower(config, R, K)
    finally:
        triton_gpu.call = call
    rows = {}
    for name, arrays, grid, launch, meta in launches:
        rows[name, meta.get("SUMMARY", False)] = {
            "kernel": name + (" (summary)" if meta.get("SUMMARY") else ""),
            "num_householder": R,
            "head_dim": K,
            "grid": list(grid),
            "warps": launch.warps,
            "stages": launch.stages,
            "columns": launch.columns,
            **_floors(name, arrays, grid, meta),
            **_compiled(name, arrays, launch, meta, config.compute_capability),
        }
    return list(rows.values())


def _lower(config: CompileConfig, R: int, K: int) -> None:
    B, T, H = config.batch_size, config.length, config.num_heads
    dtype = jnp.dtype(config.dtype)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    g = array(B, T, H, dtype=jnp.float32) if config.gated else None
    tokens = Tokens(array(B, T, H, K), *2 * (array(B, T, R, H, K),), array(B, T, R, H), g, None)
    state = array(B, H, K, K, dtype=jnp.float32)
    spans = -(-T // default_span(dtype, T=T, R=R, K=K, V=K))
    options = kernels.Options(K**-0.5, None, spans, interpret=False)

    def both(tokens, state, do):
        _, _, states = triton_gpu.forward(tokens, state, options, keep_states=True)
        return triton_gpu.backward(tokens, states, do, state, options)

    jax.eval_shape(both, tokens, state, array(B, T, H, K))


def _floors(name: str, arrays, grid, meta) -> dict[str, float]:
    """Bytes and operations, in all programs, and the two times that they cannot go below."""
    size = sum(x.size * jnp.dtype(x.dtype).itemsize for x in arrays)
    programs = grid[0] * grid[1] * (grid[2] if len(grid) > 2 else 1)
    steps = {"walk": "STEPS", "walk_back": "STEPS", "errors": "SPAN"}.get(name)
    if name == "errors" and meta["NARROW"]:
        steps = None
    products = _products(name, meta) * (meta[steps] if steps else 1) * programs
    return {
        "bytes": size,
        "operations": 2 * products,
        "floor_bytes_ms": 1e3 * size / BANDWIDTH,
        "floor_operations_ms": 1e3 * 2 * products / PEAK,
    }


def _products(name: str, meta) -> int:
    """Multiplications of a chunk in one program, of tiles as they are, padding included."""
    M, C, K = meta["M"], meta["CP"], meta["BK"]
    V = meta.get("BV", 0)
    if name == "prepare":  # grams, and the series in float32
        return M * M * K + C * M * K + M**3 // 2
    X = (1 + meta["TWO"]) * M * M
    if name == "walk":
        return 2 * M * K * V + X * V + (0 if meta["SUMMARY"] else C * K * V + C * M * V)
    if name == "errors":
        return (1 if meta["NARROW"] else 2) * M * K * V + X * V
    if name == "walk_back":
        return 2 * M * K * V + X * V + C * K * V + C * M * V
    V = meta["V"]  # gradients
    grams = (2 * C * M * K + M * M * K) * (2 if meta["HAS_G"] else 1)
    return C * M * V + M * M * V + C * K * V + 2 * M * K * V + grams


def _compiled(name: str, arrays, launch, meta, compute_capability: int) -> dict[str, Any]:
    """What Triton and the assembler say of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deltaproduct_jax.ops.kernels import triton_kernels

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
        command = [str(tool), "-res-usage", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    shared, threads = compiled.metadata.shared, 32 * launch.warps
    fit = (REGISTERS // (usage["REG"] * threads), SHARED // max(shared, 1), THREADS // threads)
    return {
        "registers": usage["REG"],
        "spilt_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": shared,
        "programs_a_multiprocessor": min(fit),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["n_h", "K = V", "kernel", "programs", "warps", "registers", "spilt B", "shared KiB"]
    head += ["at once", "MB", "GFLOP", "floor ms, bytes", "floor ms, products"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["num_householder"], r["head_dim"], r["kernel"], "x".join(map(str, r["grid"]))]
        cells += [r["warps"], r["registers"], r["spilt_bytes"], f"{r['shared_bytes'] / 1024:.0f}"]
        cells += [r["programs_a_multiprocessor"], f"{r['bytes'] / 1e6:.0f}"]
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
            rows += compile_kernels(config, R, K)
            print(table(rows[-5:]), file=sys.stderr)
    import triton

    shape = f"B={config.batch_size} T={config.length} H={config.num_heads}, {config.dtype}, "
    shape += f"{'gated' if config.gated else 'ungated'}; compute capability "
    shape += f"{config.compute_capability}, Triton {triton.__version__}"
    command_line = " ".join(["python -m experiments.gpu_compile", *argv])
    record = {"command": command_line, "shape": shape, "rows": rows}
    write_file(parsed.workdir / "compile.json", json.dumps(record, indent=1).encode() + b"\n")
    text = f"{shape}\n\n{table(rows)}\n\nCommand: `{command_line}`\n"
    write_file(parsed.workdir / "compile.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
