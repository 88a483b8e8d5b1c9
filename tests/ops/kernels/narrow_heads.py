"""What triton_child.py does with the kernels of narrow heads: cases, and what is compiled."""

import itertools
import types

import bars
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_convolution
from helpers import Case

from deltaproduct_jax.compilers.gpu import kernel_resources
from deltaproduct_jax.ops import delta_product
from deltaproduct_jax.ops.kernels.triton import narrow, passes

SMALL = {"B": 1, "H": 1, "K": 16, "V": 16}
# Two blocks at least.
CASES = {
    "grouped, packed, odd widths": Case(T=9, R=3, B=1, H=1, G=2, K=24, V=16, segments=True),
    "ungated": Case(T=20, R=4, gate=None, **SMALL),
    "one factor": Case(T=33, R=1, **SMALL),
    "seven factors": Case(T=5, R=7, **SMALL),
    "extreme decay": Case(T=20, gate="extreme", **SMALL),
    "mixed decay, packed": Case(T=20, gate="mixed", segments=True, **SMALL),
    "identical keys, beta 2": Case(T=40, gate=None, keys="identical", beta=(2, 2), **SMALL),
}
QUICK = {
    "float32": (),
    "float16": ("grouped, packed, odd widths",),
    "bfloat16": ("ungated",),
}


def cases(every: bool) -> list[tuple[str, str]]:
    """Names of cases, and dtypes; not every one is what the ordinary tests run."""
    chosen = dict.fromkeys(QUICK, tuple(CASES)) if every else QUICK
    return [(name, dtype) for dtype, names in chosen.items() for name in names]


def raw_errors(case: Case, dtype: str, inputs, run, relative, shift=0.0) -> dict[str, float]:
    """Of kernels that make SiLU, and lengths of q and k, themselves, by result.

    With ``shift`` added to q, k and v: far below 0 all of them are exponentially small.

    Where one is over its bar those of the plain recurrence are under "recurrent": keys that are
    rounded are no unit vectors.
    """
    arrays, segment_ids, tokens, state = inputs(case, dtype)
    tokens = tokens._replace(**{x: getattr(tokens, x) + jnp.asarray(shift, dtype) for x in "qkv"})
    arrays = arrays | {name: np.asarray(getattr(tokens, name), np.float64) for name in "qkv"}
    do, dstate = helpers.draw_cotangents(case.arrays())
    wide = {name: None if x is None else np.asarray(x, np.float64) for name, x in arrays.items()}
    given = {name: wide[name] for name in "qkv"}

    def entered(name, cotangent):
        flat = lambda x: x.reshape(*x.shape[:2], -1)
        how = {"silu": True, "width": None if name == "v" else case.K}
        found = oracle_convolution.activated(*map(flat, (given[name], cotangent)), **how)
        return [x.reshape(cotangent.shape) for x in found]

    wide |= {name: entered(name, x)[0] for name, x in given.items()}
    cotangents = [np.asarray(c, np.float64) for c in (do, dstate)]
    *want, dwant = oracle.delta_product(**wide, segment_ids=segment_ids, cotangents=cotangents)
    dwant |= {name: entered(name, dwant[name])[1] for name in given}
    cotangents = jnp.asarray(do, tokens.v.dtype), jnp.asarray(dstate, jnp.float32)
    names = [f"d{name}" for name in helpers.ARGUMENTS]
    wanted = dict(zip(("o", "final_state"), want, strict=True))
    wanted |= {name: dwant[name[1:]] for name in names if name[1:] in dwant}

    def of(outputs, gradients):
        found = zip(("o", "final_state", *names), (*outputs, *gradients), strict=True)
        return {name: relative(x, wanted[name]) for name, x in found if x is not None}

    found = of(*run(tokens, state, cotangents, case, True, RAW))
    if all(error <= bars.of(name, dtype) for name, error in found.items()):
        return found

    def plain(*arrays):
        *tokens, state = arrays
        how = {"initial_state": state, "segment_ids": segment_ids, "use_qk_l2norm": True}
        return delta_product(*tokens, **how, use_silu=True, implementation="recurrent")

    outputs, pullback = jax.vjp(plain, *tokens[:5], state)
    return {**found, "recurrent": of(outputs, pullback(cotangents))}


def _raw_forward(tokens, state, options, *, keep_states):
    return narrow.forward(tokens, state, options._replace(raw=True), keep_states=keep_states)


def _raw_backward(tokens, kept, do, dfinal_state, options):
    return narrow.backward(tokens, kept, do, dfinal_state, options._replace(raw=True))


RAW = types.SimpleNamespace(forward=_raw_forward, backward=_raw_backward)


def raw_elsewhere() -> dict[str, float]:
    """Kernels of a gradient lowered for CUDA, and how far a CPU is from activating first."""
    shapes = [(128, 5, 8, 32), *2 * [(128, 5, 2, 8, 32)], (128, 5, 2, 8)]
    q, k, v, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    beta = jax.nn.sigmoid(b)

    def loss(raw, q, k, v, beta):
        how = {
            "use_silu": raw,
            "use_qk_l2norm": True,
            "implementation": None if raw else "recurrent",
        }
        q, k, v = (q, k, v) if raw else map(jax.nn.silu, (q, k, v))
        o, state = delta_product(q, k, v, beta, **how)
        return jnp.sum(jnp.sin(o)) + jnp.sum(state)

    gradient = jax.jit(jax.grad(loss, (1, 2, 3, 4)), static_argnums=0)
    lowered = gradient.trace(True, q, k, v, beta).lower(lowering_platforms=("cuda",)).as_text()
    pairs = zip(*(gradient(raw, q, k, v, beta) for raw in (True, False)), strict=True)
    apart = [float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs]
    return {"kernels": lowered.count("triton_kernel_call"), "apart": max(apart)}


def resources(inputs, run) -> list[dict]:
    """What the compiler makes of the kernels of narrow heads, as they are launched."""
    from deltaproduct_jax.ops.kernels.triton import kernels as bodies

    rows, call = [], passes.call
    shapes = itertools.product((16, 32), ("bfloat16", "float32"), (True, False), (narrow, RAW))

    def compiled(name, arrays, outs, grid, launch, *, meta, aliases=None):
        del grid, aliases
        structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays, *outs)]
        how = {"warps": launch.warps, "stages": launch.stages, "compute_capability": 90}
        how["registers"] = launch.registers
        found = kernel_resources(getattr(bodies, name), structs, meta, **how)
        rows.append(
            found
            | {"kernel": name, "PARTS": meta.get("PARTS"), "K": K, "dtype": dtype}
            | {key: meta[key] for key in ("HAS_G", "RAW")}
        )
        return tuple(jnp.zeros(out.shape, out.dtype) for out in outs)

    passes.call = compiled
    for K, dtype, gated, ways in shapes:
        case = Case(T=16, R=4, B=1, H=1, K=K, V=K, gate="mild" if gated else None)
        _, _, tokens, state = inputs(case, dtype)
        do = jnp.zeros((1, 16, 1, K), dtype)
        jax.eval_shape(
            lambda tokens, state, do, case=case, ways=ways: run(
                tokens, state, (do, state), case, True, ways
            ),
            *(tokens, state, do),
        )
    passes.call = call
    return rows
