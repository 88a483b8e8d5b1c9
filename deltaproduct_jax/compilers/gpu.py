"""What Triton and NVIDIA's assembler make of a kernel, ahead of time, on a machine without a GPU.

And which kernels a program launches. Triton is imported where a kernel is compiled.
"""

import collections
import os
import re
import subprocess
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir

from deltaproduct_jax.ops.kernels import grids

# Of a multiprocessor of an H100: registers, bytes of shared memory and threads.
REGISTERS, SHARED, THREADS = 65536, 227 * 1024, 2048
TRITON_CALLS = ("triton_kernel_call", "triton_kernel_call_ffi")  # of jax-triton 0.3 and 0.4
_TRITON_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_TRITON_TYPES |= {"int8": "i8", "int32": "i32"}


def kernels_of(lowered: jax.stages.Lowered) -> collections.Counter[str]:
    """The kernels of Triton, by name, and of cuDNN that a program for CUDA calls, and how often.

    Args:
      lowered: a program before it is compiled. What stands in a function or loop counts once.
    """
    found: collections.Counter[str] = collections.Counter()

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call":
            target = ir.StringAttr(operation.attributes["call_target_name"]).value
            if target in TRITON_CALLS:
                config = operation.attributes["backend_config"]
                if target == TRITON_CALLS[1]:
                    config = operation.attributes["mhlo.backend_config"]["opaque"]
                call = zlib.decompress(ir.StringAttr(config).value_bytes)
                (name,) = re.findall(rb"\.entry (\w+)", call)
                found[name.decode()] += 1
            elif target.startswith("__cudnn$"):
                found[target] += 1
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found


def kernel_resources(
    kernel: Any,
    arrays: Sequence[jax.ShapeDtypeStruct],
    constants: Mapping[str, Any],
    *,
    warps: int,
    stages: int,
    compute_capability: int,
    registers: int | None = None,
) -> dict[str, int]:
    """Compiles a Triton kernel and reads what it takes of a multiprocessor.

    Args:
      kernel: a function under ``triton.jit``.
      arrays: shapes and dtypes of its pointers, in the order of its arguments.
      constants: its compile-time arguments; names that it has not are left out.
      warps: of a program.
      stages: of its software pipeline.
      compute_capability: 90 is an H100 or H200.
      registers: of a thread at most; None: as many as it takes.

    Returns:
      "registers" a thread, "spilt_bytes" of local memory a thread, "spills_in_loops" (see
      `spills_in_loops`), "atomics" (instructions whose order is open), "shared_bytes" a program,
      and "programs_a_multiprocessor", how many fit on one of an H100 at once.
    """
    options = {"num_warps": warps, "num_stages": stages}
    options |= {} if registers is None else {"maxnreg": registers}
    compiled, usage_text, machine_code = _compiled(
        kernel, arrays, constants, options, compute_capability
    )
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage_text)}
    shared, threads = compiled.metadata.shared, 32 * warps
    fit = (REGISTERS // (usage["REG"] * threads), SHARED // max(shared, 1), THREADS // threads)
    return {
        "registers": usage["REG"],
        "spilt_bytes": usage["STACK"] + usage["LOCAL"],
        "spills_in_loops": spills_in_loops(machine_code),
        "atomics": len(re.findall(r"\b(RED|ATOM[GS]?)\b", machine_code)),
        "shared_bytes": shared,
        "programs_a_multiprocessor": min(fit),
    }


def _compiled(kernel, arrays, constants, options, compute_capability):
    """The compiled kernel, its use of resources and its machine code, as the tools print them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    named = (grids.AS_IT_IS | dict(constants)).items()
    constants = {key: value for key, value in named if key in kernel.arg_names}
    pointers = [key for key in kernel.arg_names if key not in constants]
    signature = {
        key: f"*{_TRITON_TYPES[jnp.dtype(x.dtype).name]}"
        for key, x in zip(pointers, arrays, strict=True)
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
            options=options,
        )
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

        def dump(what: str) -> str:
            command = [str(tool), what, str(binary)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return compiled, dump("-res-usage"), dump("-sass")


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
