"""What test_gluon.py runs apart, where the newer Triton is found: prints one JSON object.

Compiles every kernel that a pass, or with "gradients" both passes of a gradient, with the sizes
given as JSON launches, without a GPU, and reads what the assembler makes of it: registers, spilt
bytes, spills in loops, shared memory, warps, barriers that nobody waits for, and whether it lets
products run beside each other. With "spans" instead, errors of the kernel for gates in Triton's
interpreter, which TRITON_INTERPRET=1 asks for.
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
import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltaproduct_jax.compilers.gpu import spills_in_loops
from deltaproduct_jax.ops.kernels import Options, grids
from deltaproduct_jax.ops.kernels.gluon import launch, passes
from deltaproduct_jax.ops.kernels.triton import passes as triton_passes
from deltaproduct_jax.ops.layout import Tokens

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def idle_barriers(code):
    """Barriers that are set, and that no instruction or partition has a use for.

    Their memory is given to others as soon as they are set, and what is written there then may come
    first.
    """

    def uses(name):
        """Instructions but that which makes it; for a view of it those of the view."""
        found = []
        for line in re.findall(rf"^(?! *{name} =).*{name}(?![\w]).*$", code, re.MULTILINE):
            view = re.match(r" *(%\w+) = ttg.memdesc_index", line)
            found += uses(view[1]) if view else [line]
        return found

    barriers = re.findall(r"(%\w+) = ttg.local_alloc : .*?memdesc<[\dx]*xi64", code)
    return [x for x in barriers if all("init_barrier" in line for line in uses(x))]


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
        "idle_barriers": idle_barriers(program.asm["ttgir"]),
        "products": len(re.findall("HGMMA", code)),
        "one_by_one": "wgmma.mma_async instructions are serialized" in report,
    }


def of_triton(kernel, meta, warps, stages):
    """Resources of a kernel that jax-triton launches, of arrays of float32."""
    names, meta = kernel.arg_names, grids.AS_IT_IS | meta
    signature = {x: "constexpr" if x in meta else "*fp32" for x in names}
    signature |= {"needs_ptr": "*i32"} if "needs_ptr" in names else {}
    pointers = [i for i, x in enumerate(names) if x not in meta]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=meta, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    target = GPUTarget("cuda", launch.COMPUTE_CAPABILITY, 32)
    return resources(triton.compile(source, target=target, options=options), None)


def compiled_kernels(*, R, K, V, gated, packed, pieces, gradients):
    """Resources of the kernels of a forward pass, or of both passes of a gradient, by name."""
    # Into one piece, many, or two, which need no map.
    B, T, H, Hv = {0: (8, 4096, 16, 16), 1: (1, 4096, 1, 2), 2: (8, 4096, 6, 6)}[pieces]
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

    def launched_by_triton(kernel, arrays, out, grid, *, num_warps, num_stages, **meta):
        del arrays, grid
        name = kernel.__name__ + " back" * meta.get("REVERSE", False)
        found[name] = of_triton(kernel, meta, num_warps, num_stages)
        return jnp.zeros(out.shape, out.dtype)

    launch.launch = launched
    passes.launch_by_triton = launched_by_triton
    # What mends is compiled in triton_child.py.
    nothing = lambda name, arrays, outs, *_, **__: [jnp.zeros(x.shape, x.dtype) for x in outs]
    triton_passes.call = nothing

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
    options = Options(K**-0.5, None, 0, interpret=False)
    state = wide(B, Hv, K, V)
    if not gradients:
        fixed = passes.fixed(tokens, options)
        jax.eval_shape(functools.partial(passes.forward, fixed), tokens, state)
        return found
    slots = -(-T * R // 128)
    fixed = passes.fixed(tokens, options._replace(spans=slots, slots=slots, more=True))
    run = functools.partial(passes.forward_kept, fixed)
    o, _, kept = jax.eval_shape(run, tokens, state)
    more = passes.kept_more(tokens, fixed.options)
    assert [(x.shape, x.dtype) for x in kept[1:]] == [(x.shape, x.dtype) for x in more]
    run = functools.partial(passes.backward, fixed)
    cotangents, of_state = jax.eval_shape(run, tokens, kept, o, state)
    dq, dk = jax.eval_shape(triton_passes.summed_over_groups, *cotangents[:2], tokens)
    named = zip((dq, dk, *cotangents[2:5]), tokens[:5], strict=True)
    assert all(x is y is None or (x.shape, x.dtype) == (y.shape, y.dtype) for x, y in named)
    assert (*of_state.shape[:2], *of_state.shape[3:]) == state.shape
    return found


def error_of_spans(R: int) -> float:
    """Of dg of one head whose first group's gates are mild, and of one whose second's are."""
    from triton_interpreter import Tensor

    from deltaproduct_jax.ops.kernels.gluon import gates, spans

    rng = np.random.default_rng(R)
    terms = rng.normal(size=(1, 2, 2, R, 4, 64)).astype(np.float32)
    wholes = rng.normal(size=(1, 2, 2, R + 1, 2)).astype(np.float32)
    sums = np.zeros((1, 2, 2, 3, 64), np.float32)
    sums[0, 0, 1, 0, -1] = sums[0, 1, 0, 0, -1] = -61.0
    arrays = [Tensor(x) for x in (terms, wholes, sums, np.full((1, 100, 2), np.nan, np.float32))]
    sizes = {"T": 100, "R": R, "RP": 1 << (R - 1).bit_length(), "HV": 2, "NC": 2, "NG": 2}
    spans.gate_cotangents[(2, 2)](*arrays, **sizes, MILD=gates.MILD)
    want, u = np.zeros((2, 128)), np.arange(64)
    behind = wholes[0, :, 1, R].sum(axis=-1)  # of the first group
    for n, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        every = wholes[0, head, n].sum(axis=-1)
        is_mild = n == head
        dg = np.zeros(64)
        for r in range(R):
            token, before = (r * 64 + np.arange(64)) // R, (r * 64 - 1) // R if r else -1
            upto, out, of_updates, of_tokens = terms[0, head, n, r]
            dg += of_updates @ (u <= token[:, None]) + of_tokens @ (u <= u[:, None])
            if not is_mild:
                dg += upto @ ((u > before) & (u <= token[:, None]))
                dg += out @ ((u > token[:, None]) & (u <= token[-1]))
                dg += every[r] * ((u > before) & (u <= token[-1]))
        if is_mild:
            dg += behind[head] if n == 0 else every[R] - terms[0, head, n, :, 2:].sum()
        want[head, n * 64 : n * 64 + 64] = dg
    return float(np.abs(arrays[3].array[0] - want.T[:100]).max())


if __name__ == "__main__":
    if sys.argv[1] == "spans":
        print(json.dumps({R: error_of_spans(R) for R in (1, 3, 8)}))
    else:
        print(json.dumps(compiled_kernels(**json.loads(sys.argv[1]))))
