"""What triton_child.py does with rows of which something is not finite, run by the interpreter."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
from helpers import Case

from deltaproduct_jax.ops import delta_product, kernels
from deltaproduct_jax.ops.kernels import containment
from deltaproduct_jax.ops.kernels.triton import choice, tiling
from deltaproduct_jax.ops.packing import starts_of_segments

# What is bad in a row: of which argument, where, and how many tokens are then bad, from that one to
# the end of its segment.
BAD = {
    "v": ((0, 40, 0, 0, 3), 20),
    "q": ((0, 40, 0, 1), 20),
    "k": ((0, 31, 1, 0, 0), 29),
    "beta": ((0, 59, 0, 0), 1),
    "g": ((0, 62, 0), 8),
    "initial_state": ((0, 0, 2, 2), 30),
}


def contained(inputs, more: bool, name: str = "v") -> dict[str, float | bool]:
    """How far one row is from the contained recurrence where another has a bad value.

    Both are in pieces, and so is the one that is run again; with ``more`` maps of pieces, X and
    scores are kept. And whether just what should be is NaN.
    """
    tiling.CHUNKS_IN_A_PIECE, tiling.PROGRAMS_AT_ONCE = 1, 8
    case = Case(T=70, B=2, H=1, K=16, V=16)
    arrays, _, tokens, state = inputs(case, "float32")
    ids = jnp.asarray(np.arange(70) // 30 + np.zeros((2, 1), int))
    tokens = tokens._replace(resets=starts_of_segments(ids))
    place, number = BAD[name]
    if name == "initial_state":
        state = state.at[place].set(jnp.nan)
    else:
        bad = jnp.inf if name == "v" else jnp.nan
        tokens = tokens._replace(**{name: getattr(tokens, name).at[place].set(bad)})
    cotangents = tuple(jnp.asarray(c, jnp.float32) for c in helpers.draw_cotangents(arrays))
    options = kernels.Options(case.K**-0.5, None, spans=2, interpret=False, more=more)
    run = {"kernel": choice, "options": options}
    o, final_state, kept = containment.forward(tokens, state, **run, keep_states=True)
    dtokens, dstate = containment.backward(tokens, kept, *cotangents, **run)

    def plain(*arrays):
        *tokens, state = arrays
        options = {"segment_ids": ids, "implementation": "recurrent"}
        return delta_product(*tokens, initial_state=state, **options)

    outputs, pullback = jax.vjp(plain, *tokens[:5], state)
    wanted = [*outputs, *pullback(cotangents)]
    found = [o, final_state, *dtokens[:5], dstate]
    pairs = list(zip(found, wanted, strict=True))
    zeros = lambda x: np.nan_to_num(np.asarray(x, np.float64), nan=0)
    return {
        "error": max(_relative(zeros(x), zeros(y)) for x, y in pairs),
        "alike": all(np.array_equal(np.isnan(x), np.isnan(y)) for x, y in pairs),
        "bad": int(np.isnan(o).any(axis=(2, 3)).sum()) == number,
    }


def told(inputs, passes) -> list[list[bool]]:
    """Of which rows kernels say that something is not finite, forward and back; of the last not.

    The others have one bad number each: of an argument, or, of two, of a cotangent.
    """
    names = [*BAD, "o", "final_state"]
    case = Case(T=20, B=len(names) + 1, H=1, K=16, V=16)
    arrays, _, tokens, state = inputs(case, "float16")
    do, dstate = (jnp.asarray(x, jnp.float32) for x in helpers.draw_cotangents(arrays))
    # A segment ends behind each, so that the last state is that of another.
    tokens = tokens._replace(resets=jnp.broadcast_to(jnp.arange(20) == 12, (case.B, 20)))
    good = tokens, state, (do, dstate)
    for row, name in enumerate(names):
        if name == "initial_state":
            state = state.at[row, 0, 2, 2].set(jnp.inf)
        elif name == "final_state":
            dstate = dstate.at[row, 0, 2, 2].set(jnp.nan)
        elif name == "o":
            do = do.at[row, 11, 0, 2].set(jnp.inf)
        else:
            x = getattr(tokens, name)
            x = x.at[(row, 11, *[0] * (x.ndim - 2))].set(jnp.nan)
            tokens = tokens._replace(**{name: x})
    options = kernels.Options(case.K**-0.5, None, spans=1, interpret=False, more=True)
    *_, seen = passes.forward(tokens, state, options, keep_states=True)
    _, _, kept, _ = passes.forward(*good[:2], options, keep_states=True)
    *_, seen_back = passes.backward(good[0], kept, do.astype(tokens.v.dtype), dstate, options)
    rows = (np.asarray(x != 0).any(axis=tuple(range(1, x.ndim))) for x in (seen, seen_back))
    return [[bool(x) for x in row] for row in rows]


def _relative(x, reference) -> float:
    return float(np.linalg.norm(x - reference) / max(np.linalg.norm(reference), 1e-300))
