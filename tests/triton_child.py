"""What test_triton.py runs apart, where Triton is found: prints one JSON object.

``interpret``: errors against the oracle, kernels run by Triton's interpreter; of all but narrow
heads float16 stands for bfloat16 too. ``compile``: what is lowered for CUDA without a GPU.
``interpret all`` takes every case and every pass; what runs otherwise stands in ``QUICK``, without
a mapped call.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys

os.environ.setdefault("XLA_FLAGS", "")
os.environ["JAX_PLATFORMS"] = "cpu"

import bad_rows
import bars
import helpers
import jax
import jax.numpy as jnp
import narrow_heads
import numpy as np
import oracle
import triton_interpreter
from helpers import Case

from deltaproduct_jax.ops import checks, delta_product, delta_product_step, kernels
from deltaproduct_jax.ops.kernels import grids
from deltaproduct_jax.ops.kernels.triton import narrow, passes, tiling
from deltaproduct_jax.ops.kernels.triton.passes import summed_over_groups
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.packing import starts_of_segments

# Grids as they are, and all in a line.
MOST, IN_A_LINE = grids.MOST, (grids.MOST[0], 0, 0)

SMALL = {"B": 1, "H": 1, "K": 16, "V": 16}
CASES = {
    "gated": Case(T=20, **SMALL),
    "ungated": Case(T=40, gate=None, **SMALL),
    "packed, grouped, odd widths": Case(T=21, R=3, B=1, H=1, G=2, K=72, V=40, segments=True),
    "one factor": Case(T=70, R=1, segments=True, **SMALL),
    "one factor, ungated": Case(T=35, R=1, gate=None, **SMALL),
    "five factors": Case(T=11, R=5, **SMALL),
    "one token, eight factors": Case(T=1, R=8, **SMALL),
    "strong decay": Case(T=20, gate="strong", **SMALL),
    "strong decay now and then": Case(T=20, gate="every8", **SMALL),
    "extreme decay": Case(T=20, gate="extreme", **SMALL),
    "mixed decay, packed": Case(T=20, gate="mixed", segments=True, **SMALL),
    "identical keys, beta 2": Case(T=40, gate=None, keys="identical", beta=(2, 2), **SMALL),
    "in pieces": Case(T=140, B=1, H=1, K=72, V=40),
    "in pieces, packed": Case(T=75, segments=True, **SMALL),
}
NARROW = (
    "gated",
    "one factor",
    "identical keys, beta 2",
    "packed, grouped, odd widths",
    "mixed decay, packed",
    "extreme decay",
    "in pieces",
)
# By dtype; the only ones that the ordinary tests run.
QUICK = {
    "float32": ("one factor, ungated", "packed, grouped, odd widths", "in pieces, packed"),
    "float16": ("one factor", "identical keys, beta 2"),
}
# Of what tells of bad queries: kernels, dtype, T, R, and whether they are raw. The first two alone
# are what the ordinary tests run.
TOLD = ((narrow, "float16", 12, 3), (passes, "float32", 40, 1))
TOLD += ((narrow, "float32", 20, 1), (narrow, "float16", 20, 4, True), (passes, "float16", 40, 3))
PASSES = tuple(itertools.product((1, 2, 3), (True, False)))  # factors, gated


def inputs(case: Case, dtype: str):
    arrays = helpers.cast(case.arrays(), dtype)
    if case.gate == "extreme":
        arrays["g"][arrays["g"] < -9e3] = -np.inf
    segment_ids = case.segment_ids()
    resets = None if segment_ids is None else starts_of_segments(jnp.asarray(segment_ids))
    tokens = (None if arrays[n] is None else jnp.asarray(arrays[n]) for n in helpers.ARGUMENTS[:5])
    return arrays, segment_ids, Tokens(*tokens, resets), jnp.asarray(arrays["initial_state"])


def run(tokens, state, cotangents, case, more, passes=passes):
    options = kernels.Options(
        case.K**-0.5, None, -(-case.T * case.R // 128), interpret=False, more=more
    )
    *outputs, states = passes.forward(tokens, state, options, keep_states=True)
    dtokens, dstate = passes.backward(tokens, states, *cotangents, options)
    dq, dk = summed_over_groups(*dtokens[:2], tokens)
    return outputs, [dq, dk, *dtokens[2:5], dstate[:, :, 0]]


def errors(case: Case, dtype: str, passes=passes) -> dict[str, float]:
    """Of the kernels, by result, and where one is over its bar those of the plain recurrence.

    These are under "recurrent"; to find them takes longer than the kernels do.
    """
    arrays, segment_ids, tokens, state = inputs(case, dtype)
    do, dstate = helpers.draw_cotangents(case.arrays())
    cotangents = jnp.asarray(do, tokens.v.dtype), jnp.asarray(dstate, jnp.float32)
    wide = {name: None if x is None else np.asarray(x, np.float64) for name, x in arrays.items()}
    *want, dwant = oracle.delta_product(
        **wide, segment_ids=segment_ids, cotangents=[np.asarray(c, np.float64) for c in cotangents]
    )

    def of(outputs, gradients):
        found = dict(zip(("o", "final_state"), zip(outputs, want, strict=True), strict=True))
        for name, x in zip(helpers.ARGUMENTS, gradients, strict=True):
            if x is not None:
                found["d" + name] = (x, dwant[name])
        return {name: relative(*pair) for name, pair in found.items()}

    def plain(*arrays):
        *tokens, state = arrays
        return delta_product(
            *tokens, initial_state=state, segment_ids=segment_ids, implementation="recurrent"
        )

    more = dtype == "float16"  # kept, or made again
    found = of(*run(tokens, state, cotangents, case, more, passes))
    if all(error <= bars.of(name, dtype) for name, error in found.items()):
        return found
    outputs, pullback = jax.vjp(plain, *tokens[:5], state)
    return {**found, "recurrent": of(outputs, pullback(cotangents))}


def relative(x, reference) -> float:
    difference = np.linalg.norm(np.asarray(x, np.float64) - np.asarray(reference, np.float64))
    # What float32 cannot hold may be 0.
    return float(max(difference - 1e-30, 0) / max(np.linalg.norm(reference), 1e-300))


def interpret(every: bool) -> dict:
    passes.call = triton_interpreter.call
    found, pieces = {}, {}
    cases = {"float32": tuple(CASES), "float16": NARROW} if every else QUICK
    for name, case in CASES.items():
        if name.startswith("in pieces"):
            tiling.CHUNKS_IN_A_PIECE, tiling.PROGRAMS_AT_ONCE = 1, 10
        for dtype in (dtype for dtype, names in cases.items() if name in names):
            grids.MOST = IN_A_LINE if dtype == "float16" else MOST
            with counted_pieces() as pieces[f"{name}, {dtype}"]:
                found[f"{name}, {dtype}"] = errors(case, dtype)
    for name, dtype in narrow_heads.cases(every):
        case = narrow_heads.CASES[name]
        found[f"narrow heads, {name}, {dtype}"] = errors(case, dtype, narrow)
        found[f"raw narrow heads, {name}, {dtype}"] = narrow_heads.raw_errors(
            case, dtype, inputs, run, relative
        )
    of_low = narrow_heads.CASES["ungated"], "bfloat16", inputs, run, relative
    found["raw narrow heads, far below 0, bfloat16"] = narrow_heads.raw_errors(*of_low, shift=-9.0)
    found = {"errors": found, "pieces": pieces, "kept": kept()}
    found["mended"] = [bad_rows.mended(inputs, in_place) for in_place in (False, True)]
    found["told"] = [bad_rows.told(inputs, *how) for how in TOLD[: None if every else 2]]
    if every:
        found["launches"] = timed()
        with counted_pieces() as pieces["vmap"]:
            found["vmap"] = vmapped()
        found["vmap of narrow heads"] = vmapped(12, narrow)
        contained = functools.partial(bad_rows.contained, inputs)
        found["contained"] = [contained(name in "kg", name) for name in bad_rows.BAD]
        found["contained"] += [contained(True, *how) for how in bad_rows.MORE]
        narrow.FEWEST_HEADS = 1
        found["contained"] += [contained(True, name) for name in bad_rows.BAD]
        found["contained"] += [contained(True, *how) for how in bad_rows.MORE]
    return found | {name: one_token(name) for name in ("step", "step_in_place")}


@contextlib.contextmanager
def counted_pieces():
    """Numbers of pieces that sequences are cut into meanwhile, each once."""
    counts, real = [], tiling.pieces_for

    def counted(*args, **sizes):
        pieces = real(*args, **sizes)
        counts[:] = sorted({*counts, pieces})
        return pieces

    tiling.pieces_for = counted
    yield counts
    tiling.pieces_for = real


def vmapped(T: int = 70, passes=passes) -> float:
    """How far a mapped call, of sequences in 4 pieces, is from one after the other, in 5."""
    tiling.CHUNKS_IN_A_PIECE, tiling.PROGRAMS_AT_ONCE = 1, 8
    case = Case(T=T, **SMALL)
    _, _, tokens, state = inputs(case, "float32")
    cotangents = tuple(jnp.asarray(c, jnp.float32) for c in helpers.draw_cotangents(case.arrays()))

    def one(q, state):
        return run(tokens._replace(q=q), state, cotangents, case, True, passes)

    q, states = jnp.stack([tokens.q, 2 * tokens.q]), jnp.stack([state, -state])
    together = jax.vmap(one, (0, 0))(q, states)
    apart = [one(q[i], states[i]) for i in range(2)]
    apart = jax.tree.map(lambda *x: jnp.stack(x), *apart)
    return max(jax.tree.leaves(jax.tree.map(relative, together, apart)))


def kept() -> dict[str, bool]:
    """Whether kernels write all of what is kept; what they leave is NaN in the interpreter."""
    tiling.CHUNKS_IN_A_PIECE, tiling.PROGRAMS_AT_ONCE = 1, 8
    case = Case(T=128, B=1, H=1, K=128, V=128, gate=None)
    _, _, tokens, state = inputs(case, "float16")
    options = kernels.Options(case.K**-0.5, None, spans=2, interpret=False, more=True)
    *_, arrays = passes.forward(tokens, state, options, keep_states=True)
    names = ("states", "X", "scores", "maps")
    return {n: bool(jnp.all(jnp.isfinite(x))) for n, x in zip(names, arrays, strict=True)}


def timed() -> list[dict]:
    """What gpu_launches says of a walk."""
    from experiments.hardware import gpu_launches

    sizes = {"batch_size": 1, "length": 8, "num_heads": 1, "head_dim": (16,), "dtype": "float32"}
    config = gpu_launches.LaunchesConfig(**sizes, variants=("4:1:16",), repeats=1)
    return gpu_launches.rows_of(config, 2, 16, "walk")


def one_token(name: str = "step") -> dict[str, float]:
    case = Case(T=1, R=3, B=2, H=1, G=2, K=24, V=40)
    arrays, _, tokens, state = inputs(case, "float32")
    q, k, v, beta, g = (x[:, 0] for x in tokens[:5])
    passes.call = lambda _, *args, **named: triton_interpreter.call(name, *args, **named)
    grids.MOST = IN_A_LINE if name == "step" else MOST
    o, final_state = passes.step(state, q, k, v, beta, g, scale=case.K**-0.5)
    want = oracle.delta_product(**arrays)
    return {"o": relative(o, want[0][:, 0]), "final_state": relative(final_state, want[1])}


def compile_for_cuda() -> dict:
    from experiments.hardware import gpu_compile

    config = gpu_compile.CompileConfig(head_dim=(128,), num_householder=(2,))
    os.environ[passes.COMPUTE_CAPABILITY_VARIABLE] = str(config.compute_capability)
    rows = gpu_compile.compile_kernels(config, R=2, K=128)
    launches = gpu_compile.launches

    def some(chosen, R=2, **sizes):
        gpu_compile.launches = lambda *shape: list(filter(chosen, launches(*shape)))
        return gpu_compile.compile_kernels(dataclasses.replace(config, **sizes), R, 128)

    # Passes in pieces, and of whole ones the kernels that know of pieces.
    of_passes = []
    is_walk = lambda call: call.name in ("walk", "walk_back")
    for R, gated in PASSES:
        found = some(lambda call: True, R, batch_size=1, length=32768, gated=gated)
        found += [r | {"kernel": r["kernel"] + ", whole"} for r in some(is_walk, R, gated=gated)]
        of_passes += [r | {"gated": gated} for r in found]
    of_pieces = lambda call: call.name == "compose" or call.meta.get("SUMMARY")
    rows += some(of_pieces, batch_size=1, length=32768)
    [wide] = some(lambda call: call.name == "prepare", dtype="float32", gated=False)
    rows.append(wide | {"kernel": "prepare, float32"})
    shapes = [(1, 64, 2, 32), (1, 64, 2, 2, 32), (1, 64, 2, 2, 32), (1, 64, 2, 2)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def loss(q, k, v, beta, implementation):
        return jnp.sum(delta_product(q, k, v, beta, implementation=implementation)[0])

    lowered = {"step": lower_step(), "versions": kernels_by_version()}
    lowered |= lower_wide(loss) | {"narrow heads": lower_narrow(loss)}
    lowered |= {"raw": narrow_heads.raw_elsewhere()}
    for implementation in ("triton", None, "chunked"):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4)
        traced = gradient.trace(*arrays, implementation)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        lowered[str(implementation)] = text.count("triton_kernel_call")

    def packed(*arrays):
        o, _ = delta_product(
            *arrays, segment_ids=jnp.zeros((1, 64), jnp.int32), implementation="triton"
        )
        return jnp.sum(o)

    for name, known in {"packed": contextlib.nullcontext, "finite": checks.known_finite}.items():
        jax.clear_caches()  # of the same function
        with known():
            traced = jax.jit(jax.grad(packed, argnums=(0, 1, 2, 3))).trace(*arrays)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        lowered[name] = text.count("triton_kernel_call")
    gated = lambda *arrays: jnp.sum(delta_product(*arrays, implementation="triton")[0])
    traced = jax.jit(jax.grad(gated, argnums=4)).trace(*arrays, arrays[3].update(shape=(1, 64, 2)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    lowered["passes over gates"] = text.count("stablehlo.maximum")
    os.environ[passes.COMPUTE_CAPABILITY_VARIABLE] = "89"
    jax.clear_caches()
    traced = gradient.trace(*arrays, None)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    lowered["on a small GPU"] = text.count("triton_kernel_call")
    try:
        traced = jax.jit(loss, static_argnums=4).trace(*arrays, "triton")
        traced.lower(lowering_platforms=("cpu",))
        lowered["on a CPU"] = "lowered"
    except Exception as error:  # whatever it is, the user reads it
        lowered["on a CPU"] = str(error)
    heads = narrow_heads.resources(inputs, run)
    return {"rows": rows, "passes": of_passes, "lowered": lowered, "heads": heads}


def lower_wide(loss) -> dict:
    """A gradient with large states, traced where the kernels say what is kept for it.

    How many kernels it holds when lowered for CUDA, also where one sequence is cut into pieces, and
    how much it differs on a CPU, where it runs here, from one that has never heard of them.
    """
    shapes = [(1, 64, 1, 128), (1, 64, 2, 1, 128), (1, 64, 2, 1, 128), (1, 64, 2, 1)]
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape)
    arrays = [draw(i, shape) / shape[-1] ** 0.5 for i, shape in enumerate(shapes)]

    def gradient(implementation, **policy):
        run = jax.checkpoint(lambda *arrays: loss(*arrays, implementation), **policy)
        return jax.jit(jax.grad(run, argnums=(0, 1, 2, 3)))

    def count(T: int) -> int:
        narrow = [jax.ShapeDtypeStruct((1, T, *x.shape[2:]), jnp.bfloat16) for x in arrays]
        everything = jax.checkpoint_policies.everything_saveable
        traced = gradient(None, policy=everything).trace(*narrow)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("triton_kernel_call")

    got, want = (gradient(name)(*arrays) for name in (None, "chunked"))
    differences = [relative(x, np.asarray(y, np.float64)) for x, y in zip(got, want, strict=True)]
    return {"wide": count(64), "in pieces": count(2048), "on a CPU instead": max(differences)}


def lower_narrow(loss) -> int:
    """How many kernels the gradient of many narrow heads holds when lowered for CUDA."""
    shapes = [(128, 16, 8, 32), (128, 16, 2, 8, 32), (128, 16, 2, 8, 32), (128, 16, 2, 8)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    gradient = jax.jit(jax.grad(lambda *arrays: loss(*arrays, None), argnums=(0, 1, 2, 3)))
    lowered = gradient.trace(*arrays).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("triton_kernel_call")


def kernels_by_version() -> list[str]:
    """The kernel of one token that is launched through jax-triton 0.3 and through 0.4."""
    import jax_triton

    launched, real = [], jax_triton.triton_call

    def by_shape(*_, kernel, out_shape, **__):
        launched.append(kernel.fn.__name__)
        return tuple(jnp.zeros(out.shape, out.dtype) for out in out_shape)

    def by_type(*arrays, kernel, out_type, **named):
        return by_shape(*arrays, kernel=kernel, out_shape=out_type, **named)

    shapes = [(1, 2, 32, 32), (1, 2, 32), (1, 1, 2, 32), (1, 1, 2, 32), (1, 1, 2)]
    arrays = [jnp.zeros(shape) for shape in shapes]
    for jax_triton.triton_call in (by_shape, by_type):
        passes.step(*arrays, None, scale=1.0)
    jax_triton.triton_call = real
    return launched


def lower_step() -> tuple[list[int], int]:
    """Calls of the kernel in one token with 1 and 2 factors, and in the derivative with 2.

    And the barriers before the state that is written in place, with 1 factor.
    """
    arrays = [jax.ShapeDtypeStruct((1, 2, 32, 32), jnp.float32)]
    texts = []

    def o(state, *token):
        return jnp.sum(delta_product_step(state, *token)[0])

    for R, function in ((1, o), (2, o), (2, jax.grad(o))):
        shapes = [(1, 2, 32), (1, R, 2, 32), (1, R, 2, 32), (1, R, 2)]
        token = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        traced = jax.jit(function).trace(*arrays, *token)
        texts.append(traced.lower(lowering_platforms=("cuda",)).as_text())
    barriers = texts[0].count("stablehlo.optimization_barrier")
    return [text.count("triton_kernel") for text in texts], barriers


if __name__ == "__main__":
    mode, *every = sys.argv[1:]
    found = interpret(every=bool(every)) if mode == "interpret" else compile_for_cuda()
    print(json.dumps(found))
