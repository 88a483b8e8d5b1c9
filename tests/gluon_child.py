"""What test_gluon.py runs apart, where the newer Triton is found: prints one JSON object.

Compiles every kernel that a pass, or with "gradients" both passes of a gradient, with the sizes
given as JSON launches, without a GPU, and reads
what the assembler makes of it: registers, spilt bytes, spills in loops, shared memory, warps, and
whether it lets products run beside each other.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltaproduct_jax.compilers.gpu import spills_in_loops
from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.gluon import launch, passes
from deltaproduct_jax.ops.layout import Tokens

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def resources(program, registers):
    """What the compiled kernel takes, with at most so many registers."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(launch.limited(program.asm["ptx"], registers))
        assemble = [TOOLS / "ptxas", "-v", "-arch=sm_90a", ptx, "-o", binary]
        report = subprocess.run(assemble, capture_output=True, text=True, check=True).stderr
        show = [TOOLS / "cuobjdump", "-sass", binary]
        code = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilt_bytes": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        "spills_in_loops": spills_in_loops(code),
        "shared_bytes": program.metadata.shared,
        "scratch_bytes": program.metadata.global_scratch_size,
        "warps": program.metadata.num_warps,
        "products": len(re.findall("HGMMA", code)),
        "one_by_one": "wgmma.mma_async instructions are serialized" in report,
    }


def compose(K, V, forgets, reverse):
    """The kernel that finds what pieces begin with, as `passes.composed` launches it."""
    from deltaproduct_jax.ops.kernels.gluon import pieces

    meta = {"K": K, "V": V, "BV": passes.COMPOSED_COLUMNS, "PIECES": 8}
    meta |= {"REVERSE": reverse, "FORGETS": forgets}
    names = pieces.compose.arg_names
    signature = {x: "constexpr" if x in meta else "*fp32" for x in names} | {"needs_ptr": "*i32"}
    pointers = [i for i, x in enumerate(names) if x not in meta]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=pieces.compose, signature=signature, constexprs=meta, attrs=attributes)
    options = {"num_warps": passes.COMPOSED_WARPS, "num_stages": passes.COMPOSED_STAGES}
    target = GPUTarget("cuda", launch.COMPUTE_CAPABILITY, 32)
    return resources(triton.compile(source, target=target, options=options), None)


def compiled_kernels(*, R, K, V, gated, packed, pieces, gradients):
    """Resources of the kernels of a forward pass, or of both passes of a gradient, by name."""
    B, T, H, Hv = (1, 4096, 1, 2) if pieces else (8, 4096, 16, 16)
    found = {}

    def launched(kernel, arrays, outs, grid, *, warps, tiles, registers=None, **constants):
        del grid
        dtypes = tuple(str(x.dtype) for x in (*arrays, *outs))
        program = launch.compiled(
            kernel, dtypes, warps, tuple(tiles.items()), tuple(constants.items())
        )
        kept = "kept" * constants.get("HAS_KEPT", False)
        name = " ".join([kernel.__name__, constants.get("START", ""), kept]).strip()
        found[name] = resources(program, registers)
        return [jnp.zeros(x.shape, x.dtype) for x in outs]

    launch.launch = launched
    passes.composed = lambda call, *_, **__: jnp.zeros(call.states(call.pieces, V).shape)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    wide = functools.partial(array, dtype=jnp.float32)
    tokens = Tokens(
        array(B, T, H, K),
        array(B, T, R, H, K),
        array(B, T, R, Hv, V),
        wide(B, T, R, Hv),
        wide(B, T, Hv) if gated else None,
        array(B, T, dtype=jnp.bool_) if packed else None,
    )
    if pieces:
        for name, reverse in (("compose", False), ("compose back", True)):
            found[name] = compose(K, V, gated or packed, reverse)
    options = Options(K**-0.5, None, 0, interpret=False)
    state = wide(B, Hv, K, V)
    if not gradients:
        jax.eval_shape(functools.partial(passes.forward, options), tokens, state)
        return found
    slots = -(-T * R // 128)
    fixed = passes.fixed(tokens, options._replace(spans=slots, slots=slots, more=True))
    run = functools.partial(passes.forward_kept, fixed)
    o, _, kept = jax.eval_shape(run, tokens, state)
    more = passes.kept_more(tokens, fixed.options)
    assert [(x.shape, x.dtype) for x in kept[1:]] == [(x.shape, x.dtype) for x in more]
    run = functools.partial(passes.backward, fixed)
    cotangents, of_state = jax.eval_shape(run, tokens, kept, o, state)
    named = zip(cotangents[:5], tokens[:5], strict=True)
    assert all(x is y is None or (x.shape, x.dtype) == (y.shape, y.dtype) for x, y in named)
    assert of_state.shape == state.shape
    return found


if __name__ == "__main__":
    print(json.dumps(compiled_kernels(**json.loads(sys.argv[1]))))
