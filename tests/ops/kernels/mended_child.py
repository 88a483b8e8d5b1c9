"""What test_mend_back.py runs apart, where Triton is found: prints one JSON object.

``interpret``: how far gradients are from those of the contained recurrence, by Triton's
interpreter; ``compile``: what the compiler makes of the kernel.
"""

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
from deltaproduct_jax.ops.kernels.triton import mend_back
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.packing import starts_of_segments

ONE = {"B": 1, "H": 1}
# Segments: a token's row, and where in it they begin.
PLAIN = Case(T=11, R=2, K=3, V=5, **ONE)
PACKED = Case(T=13, R=1, K=4, V=3, B=2, H=1, G=2)
LONG = Case(T=24, R=3, K=3, V=20, gate=None, **ONE)
STARTS = (0, 4, 9)
# Name: case, dtype, packed, what is bad (an argument or a cotangent, and where), and the token from
# which on cotangents are 0.
BAD = {
    "k": (PLAIN, "float32", False, [("k", (0, 6, 1, 0, 2))], 6),
    "k, asked for": (PACKED, "float32", True, [("k", (0, 6, 0, 0, 2))], None),
    "v": (PACKED, "bfloat16", True, [("v", (1, 5, 0, 1, 1))], 5),
    "v, asked for": (PLAIN, "float16", False, [("v", (0, 4, 0, 0, 1))], 7),
    "beta": (LONG, "bfloat16", False, [("beta", (0, 20, 2, 0))], 20),
    "g": (PACKED, "float32", True, [("g", (0, 7, 1))], 7),
    "q": (PACKED, "float32", True, [("q", (0, 5, 0, 0))], 5),
    "initial_state": (PACKED, "float32", True, [("initial_state", (0, 1, 2, 2))], 0),
    "initial_state, asked for": (PLAIN, "float32", False, [("initial_state", (0, 0, 2, 2))], 2),
    "do": (PACKED, "float32", True, [("do", (0, 5, 1, 2))], None),
    "dfinal": (PACKED, "float32", True, [("dfinal", (1, 0, 3, 2))], None),
    "do before k": (LONG, "float32", False, [("do", (0, 2, 0, 7)), ("k", (0, 21, 0, 0, 0))], 21),
    "two segments": (PACKED, "float32", True, [("v", (0, 6, 0, 0, 0)), ("do", (0, 1, 0, 1))], 6),
}


def inputs(case, dtype, packed, bad, zero_from):
    arrays = {n: None if x is None else np.array(x) for n, x in case.arrays().items()}
    do, dfinal = (np.array(x) for x in helpers.draw_cotangents(arrays))
    if zero_from is not None:
        do[:, zero_from : 9 if packed else None] = 0
        if not packed:
            dfinal[:] = 0
    arrays |= {"do": do, "dfinal": dfinal}
    if arrays["g"] is not None:
        arrays["g"][:, 2] = -1e4
    for name, index in bad:
        arrays[name][index] = np.inf if name == "v" else np.nan
    wide = {"initial_state", "dfinal"}
    arrays = {
        n: None if x is None else jnp.asarray(x, "float32" if n in wide else dtype)
        for n, x in arrays.items()
    }
    ids = np.searchsorted(STARTS, np.arange(case.T), side="right") * np.ones((case.B, 1), int)
    return arrays, jnp.asarray(ids) if packed else None


def of_value_heads(x, H, axis):
    return x if x.shape[axis] == H else jnp.repeat(x, H // x.shape[axis], axis)


def errors(case, dtype, packed, bad, zero_from, raw=False):
    """The largest error, and whether the same numbers are NaN."""
    arrays, ids = inputs(case, dtype, packed, bad, zero_from)
    names = [n for n in helpers.ARGUMENTS if arrays[n] is not None]
    heads = case.H * case.G

    def run(arrays):
        how = {"use_silu": True, "use_qk_l2norm": True} if raw else {}
        return delta_product(**arrays, segment_ids=ids, implementation="chunked", **how)

    # With a key head for each value head, as kernels find gradients before they are added up.
    given = {n: arrays[n] for n in names}
    given |= {"q": of_value_heads(given["q"], heads, 2), "k": of_value_heads(given["k"], heads, 3)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    outputs, pull = jax.vjp(run, wide)
    cotangents = (arrays["do"].astype(outputs[0].dtype), arrays["dfinal"])
    want = pull(cotangents)[0]
    resets = None if ids is None else starts_of_segments(ids)
    tokens = Tokens(*(arrays[n] for n in helpers.ARGUMENTS[:5]), resets)
    # What kernels leave of a bad row, at worst; dbeta tells.
    spoilt = Tokens(*(given.get(n) for n in helpers.ARGUMENTS[:5]), None)
    spoilt = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), spoilt)
    options = kernels.Options(case.K**-0.5, None, spans=1, interpret=False, raw=raw)
    state = arrays["initial_state"]
    of_pass = arrays["do"], arrays["dfinal"], spoilt, jnp.full_like(state, jnp.nan)
    found, dstate = mend_back.mended(triton_interpreter.call, tokens, state, *of_pass, options)
    found = {**found._asdict(), "initial_state": dstate}
    pairs = [(np.asarray(found[n], np.float64), np.asarray(want[n], np.float64)) for n in names]
    zeros = functools.partial(np.nan_to_num, nan=0)
    apart = lambda x, y: np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
    return {
        "error": max(float(apart(zeros(x), zeros(y))) for x, y in pairs),
        "alike": all(np.array_equal(np.isnan(x), np.isnan(y)) for x, y in pairs),
        "nan": sum(int(np.isnan(y).sum()) for _, y in pairs),
        "finite": sum(int(np.count_nonzero(zeros(y))) for _, y in pairs),
    }


def interpret(every):
    found = {name: errors(*case) for name, case in BAD.items()}
    return found


if __name__ == "__main__":
    print(json.dumps(interpret("all" in sys.argv[2:])))
