"""What test_mend_back.py runs apart, where Triton is found: prints one JSON object.

``interpret``: how far gradients are from those of "chunked", by Triton's interpreter; ``compile``:
what the compiler makes of the kernel. With ``all`` every case.
"""

import dataclasses
import functools
import json
import os
import sys

os.environ.setdefault("XLA_FLAGS", "")
os.environ["JAX_PLATFORMS"] = "cpu"

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import triton_interpreter
from helpers import Case

from deltaproduct_jax.ops import delta_product, kernels
from deltaproduct_jax.ops.kernels.triton import mend_back, narrow, passes, tiling
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.packing import starts_of_segments

SMALL = Case(T=10, R=2, B=2, H=1, G=2, K=3, V=5)
STARTS = (0, 3, 8)  # of segments, where a row is packed
HEAD_AXES = {"q": 2, "k": 3, "v": 3, "beta": 3, "g": 2, "initial_state": 1, "do": 2, "dfinal": 1}


@dataclasses.dataclass(frozen=True)
class Bad:
    """What is bad: of which argument or cotangent, and where."""

    numbers: dict[str, tuple[int, ...]]
    zero_from: int | None = None  # from where on cotangents of the segment are 0
    packed: bool = True
    dtype: str = "float32"
    case: Case = SMALL
    raw: bool = False
    name: str = "mend_back"  # of the kernel
    told: int | None = None  # the only update of which dbeta tells; None: all do


QUICK = {
    "k": Bad({"k": (0, 5, 1, 0, 2)}, zero_from=5, packed=False),
    "k, asked for": Bad({"k": (0, 5, 0, 0, 2)}),
    "v": Bad({"v": (1, 5, 0, 1, 1)}, zero_from=5, dtype="bfloat16"),
    "v, asked for": Bad({"v": (0, 7, 0, 1, 1)}, zero_from=9, packed=False, dtype="float16"),
    "beta": Bad({"beta": (1, 8, 1, 0)}, zero_from=8, name="mend_back_in_place"),
    "g": Bad({"g": (0, 5, 1)}, zero_from=5),
    "q": Bad({"q": (0, 5, 0, 0)}, zero_from=5),
    "initial_state": Bad({"initial_state": (0, 1, 2, 2)}, zero_from=0),
    "initial_state, asked for": Bad({"initial_state": (0, 1, 2, 2)}, zero_from=2),
    "do": Bad({"do": (0, 5, 1, 2)}),
    "dfinal": Bad({"dfinal": (1, 0, 2, 2)}),
    "do before v": Bad({"do": (0, 1, 0, 1), "v": (0, 9, 0, 0, 0)}, zero_from=9, packed=False),
    "two segments": Bad({"do": (0, 1, 0, 1), "v": (0, 6, 0, 0, 0)}, zero_from=6),
}
UNGATED = Case(T=24, R=3, K=3, V=20, gate=None, B=1, H=1)
ONE = Case(T=70, R=1, K=4, V=3, gate="mixed", B=1, H=2)
WIDE = Case(T=5, R=2, K=4, V=18, B=1, H=1)
SLOW = {
    "ungated": Bad({"do": (0, 2, 0, 7)}, packed=False, case=UNGATED),
    "ungated, bfloat16": Bad({"k": (0, 22, 0, 0, 0)}, 22, False, "bfloat16", UNGATED),
    "one factor": Bad({"v": (0, 68, 0, 1, 0)}, 68, False, case=ONE, told=69),
    "one factor, packed": Bad({"do": (0, 1, 0, 1)}, case=ONE, told=0),
    "one factor, float16": Bad({"do": (0, 66, 1, 1)}, dtype="float16", case=ONE, told=63),
    "one factor, second part": Bad({"do": (0, 66, 1, 1)}, case=ONE, told=64),
    "raw": Bad({"do": (0, 5, 1, 2)}, packed=False, raw=True),
    "raw, packed": Bad({"k": (0, 5, 0, 0, 2)}, raw=True),
    "in parts of V": Bad({"v": (0, 4, 1, 0, 17)}, 4, False, case=WIDE),
}


def inputs(bad: Bad):
    """Arrays by name, with cotangents, and ids of segments."""
    arrays = dict(bad.case.arrays())
    arrays |= dict(zip(("do", "dfinal"), helpers.draw_cotangents(arrays), strict=True))
    arrays = {name: None if x is None else np.array(x) for name, x in arrays.items()}
    T = bad.case.T
    if bad.zero_from is not None:
        end = min([s for s in (*STARTS, T) if s > bad.zero_from]) if bad.packed else T
        arrays["do"][:, bad.zero_from : end] = 0
        if end == T:
            arrays["dfinal"][:] = 0
    if arrays["g"] is not None:
        arrays["g"][:, 2] = -np.inf
    for name, index in bad.numbers.items():
        arrays[name][index] = np.inf if name == "v" else np.nan
    wide = ("initial_state", "dfinal")
    arrays = {
        name: None if x is None else jnp.asarray(x, "float32" if name in wide else bad.dtype)
        for name, x in arrays.items()
    }
    starts = np.searchsorted(STARTS, np.arange(T), side="right") if bad.packed else np.zeros(T, int)
    return arrays, jnp.asarray(np.broadcast_to(starts, (bad.case.B, T)))


@functools.partial(jax.jit, static_argnums=3)
def gradients(arrays, ids, cotangents, raw):
    """Those of the contained "chunked"."""
    how = {"use_silu": True, "use_qk_l2norm": True} if raw else {}

    T = arrays["q"].shape[1]  # in one chunk, which is compiled soonest

    def run(arrays):
        return delta_product(
            **arrays, segment_ids=ids, implementation="chunked", chunk_size=T, **how
        )

    return jax.vjp(run, arrays)[1](cotangents)[0]


def bad_heads(bad: Bad) -> np.ndarray:
    """[B, Hv] bool."""
    B, H, G = bad.case.B, bad.case.H, bad.case.G
    found = np.zeros((B, H * G), bool)
    for name, index in bad.numbers.items():
        head = index[HEAD_AXES[name]]
        found[index[0], slice(head * G, (head + 1) * G) if name in "qk" else head] = True
    return found


def errors(bad: Bad) -> dict[str, float | bool | int]:
    """The largest error of bad heads, and whether just what should be is NaN; others stay."""
    arrays, ids = inputs(bad)
    names = [name for name in helpers.ARGUMENTS if arrays[name] is not None]
    # A key head for each value head: so kernels find gradients, before they are added up.
    given = {name: arrays[name].astype("float32") for name in names}
    for name in "qk":
        given[name] = jnp.repeat(given[name], bad.case.G, HEAD_AXES[name])
    cotangents = tuple(arrays[name].astype("float32") for name in ("do", "dfinal"))
    want = gradients(given, ids, cotangents, bad.raw)
    heads = bad_heads(bad)

    def of_heads(name, x):
        """Whether a number belongs to a bad head."""
        shape = [n if axis in (0, HEAD_AXES[name]) else 1 for axis, n in enumerate(x.shape)]
        return np.broadcast_to(heads.reshape(shape), x.shape)

    # What kernels found: of bad heads NaN, at worst, of others any number.
    spoilt = {name: np.where(of_heads(name, x), np.nan, 7.0) for name, x in given.items()}
    if bad.told is not None:
        told = np.arange(bad.case.T * bad.case.R).reshape(1, -1, bad.case.R, 1) == bad.told
        spoilt["beta"] = np.where(told, spoilt["beta"], 7.0)
    spoilt = {name: jnp.asarray(x, arrays[name].dtype) for name, x in spoilt.items()}
    resets = starts_of_segments(ids) if bad.packed else None
    tokens = Tokens(*(arrays[name] for name in helpers.ARGUMENTS[:5]), resets)
    dtokens = Tokens(*(spoilt.get(name) for name in helpers.ARGUMENTS[:5]), None)
    options = kernels.Options(bad.case.K**-0.5, None, spans=1, interpret=False, raw=bad.raw)
    call = lambda _, *args, **named: triton_interpreter.call(bad.name, *args, **named)
    of_pass = arrays["initial_state"], arrays["do"], arrays["dfinal"], dtokens
    dstates = spoilt["initial_state"][:, :, None]
    found, dstate = mend_back.mended(call, tokens, *of_pass, dstates, options)
    found = found._asdict() | {"initial_state": dstate}
    result = {"error": 0.0, "alike": True, "nan": 0, "exact": 0}
    for name in names:
        x, y = (np.asarray(z, np.float64) for z in (found[name], want[name]))
        here = of_heads(name, x)
        result["alike"] &= np.array_equal(np.isnan(x[here]), np.isnan(y[here]))
        result["alike"] &= bool(np.all(x[~here] == 7.0))
        result["nan"] += int(np.isnan(y[here]).sum())
        x, y = (np.nan_to_num(z[here], nan=0) for z in (x, y))
        result["exact"] += int(np.count_nonzero(y))
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
        result["error"] = max(result["error"], float(error))
    return result


def told(of, case: Case, where: int, *, packed: bool, dtype: str = "float32") -> list[bool]:
    """Of rows with one bad number each, and one with none, whether kernels tell by dbeta.

    Where it is looked at; and although all cotangents of bad rows are 0.
    """
    names = [*helpers.ARGUMENTS, "do", "dfinal"]
    case = dataclasses.replace(case, B=len(names) + 1)
    arrays, _ = inputs(Bad({}, zero_from=0, packed=False, dtype=dtype, case=case))
    arrays["do"] = arrays["do"].at[-1].set(1.0)
    for row, name in enumerate(names):
        x = arrays[name]
        at = (row, 0, 1, 2) if name in ("initial_state", "dfinal") else (row, where)
        arrays[name] = x.at[(*at, *(x.ndim - len(at)) * [0])].set(jnp.nan)
    starts = np.isin(np.arange(case.T), (5, case.T // 2, case.T - 3))
    resets = jnp.asarray(np.broadcast_to(starts, (case.B, case.T))) if packed else None
    tokens = Tokens(*(arrays[name] for name in helpers.ARGUMENTS[:5]), resets)
    spans = -(-case.T * case.R // 128)
    options = kernels.Options(case.K**-0.5, None, spans=spans, interpret=False, more=True)
    _, _, kept, *_ = of.forward(tokens, arrays["initial_state"], options, keep_states=True)
    dtokens, *_ = of.backward(tokens, kept, arrays["do"], arrays["dfinal"], options)
    dbeta = np.asarray(dtokens.beta, np.float64).reshape(case.B, -1)
    begins = np.arange(0, case.T, mend_back.LOOKED_AT) * case.R
    ends = np.minimum(begins + mend_back.LOOKED_AT * case.R, case.T * case.R) - 1
    looked_at = np.concatenate([begins, ends, np.arange(case.T * case.R)[-16:]])
    return [bool(x) for x in ~np.isfinite(dbeta[:, looked_at]).all(axis=1)]


def all_told() -> list[list[bool]]:
    """Of wide heads, in one piece and in several, and of narrow ones."""
    passes.call = triton_interpreter.call
    of_head = {"H": 1, "K": 16, "V": 16}
    found = [
        told(passes, Case(T=70, **of_head), 66, packed=False),
        told(passes, Case(T=20, R=1, **of_head), 0, packed=True, dtype="float16"),
        told(narrow, Case(T=24, R=3, **of_head), 23, packed=True),
        told(narrow, Case(T=20, R=1, **of_head), 7, packed=False, dtype="float16"),
    ]
    tiling.CHUNKS_IN_A_PIECE, tiling.PROGRAMS_AT_ONCE = 1, 40
    return [*found, told(passes, Case(T=140, R=1, **of_head), 100, packed=True)]


def interpret(every: bool) -> dict:
    found = {name: errors(bad) for name, bad in QUICK.items()}
    if every:
        mend_back.STATE_AT_ONCE = 256  # 16 columns of V at a time
        found |= {name: errors(bad) for name, bad in SLOW.items()}
        found["told"] = all_told()
    return found


def resources() -> list[dict]:
    """What the compiler makes of the kernel: wide heads, narrow ones, and the widest."""
    from deltaproduct_jax.compilers.gpu import kernel_resources
    from deltaproduct_jax.ops.kernels.triton import kernels as bodies

    rows = []

    def compiled(name, arrays, outs, grid, launch, *, meta, aliases):
        del aliases
        how = {"warps": launch.warps, "stages": launch.stages, "compute_capability": 90}
        found = kernel_resources(getattr(bodies, name + "_in_place"), arrays, meta, **how)
        rows.append(found | {"K": meta["K"], "programs": grid[0], "warps": launch.warps})
        return [jnp.zeros(x.shape, x.dtype) for x in outs]

    bfloat16, float32 = jnp.bfloat16, jnp.float32
    for B, T, R, H, HV, K, V, dtype in (
        (8, 4096, 1, 16, 16, 128, 128, bfloat16),
        (256, 256, 2, 32, 32, 32, 32, bfloat16),
        (2, 256, 2, 8, 16, 256, 512, float32),
    ):
        shaped = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
        q, k = shaped(B, T, H, K), shaped(B, T, R, H, K)
        v, beta = shaped(B, T, R, HV, V), shaped(B, T, R, HV)
        g, state = shaped(B, T, HV), shaped(B, HV, K, V, dtype=float32)
        dtokens = Tokens(shaped(B, T, HV, K), shaped(B, T, R, HV, K), v, beta, g, None)
        tokens = Tokens(q, k, v, beta, g, shaped(B, T, dtype=bool))
        options = kernels.Options(1.0, None, spans=1, interpret=False, raw=K == 32)
        dstates = shaped(B, HV, 2, K, V, dtype=float32)
        of_pass = state, shaped(B, T, HV, V), state, dtokens, dstates
        run = functools.partial(mend_back.mended, compiled, options=options)
        jax.eval_shape(run, tokens, *of_pass)
    return rows


if __name__ == "__main__":
    every = "all" in sys.argv[2:]
    print(json.dumps(interpret(every) if sys.argv[1] == "interpret" else resources()))
