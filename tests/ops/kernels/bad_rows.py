"""What triton_child.py does with rows of which something is not finite, run by the interpreter."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import triton_interpreter
from helpers import Case

from deltaproduct_jax.ops import delta_product, kernels
from deltaproduct_jax.ops.kernels import containment
from deltaproduct_jax.ops.kernels.triton import choice, mend, tiling
from deltaproduct_jax.ops.packing import starts_of_segments

# What is bad in a row: of which argument or cotangent, where, and how many tokens are then bad of
# packed rows, from that one to the end of its segment, and of others.
BAD = {
    "v": ((0, 40, 0, 0, 3), 20, 30),
    "q": ((0, 40, 0, 1), 20, 30),
    "k": ((0, 31, 1, 0, 0), 29, 39),
    "beta": ((0, 59, 0, 0), 1, 11),
    "g": ((0, 62, 0), 8, 8),
    "initial_state": ((0, 0, 2, 2), 30, 70),
    "o": ((0, 40, 0, 3), 0, 0),
    "final_state": ((0, 0, 2, 2), 0, 0),
}
# The same where rows are not packed, and of a loss that leaves out what is NaN.
MORE = [(name, packed, not packed) for name in ("v", "q", "g") for packed in (True, False)]


def contained(
    inputs, more: bool, name: str = "v", packed: bool = True, seen: bool = True
) -> dict[str, float | bool]:
    """How far one row is from the contained recurrence where another has a bad value.

    Both are in pieces; with ``more`` maps of pieces, X and scores are kept. And whether just what
    should be is NaN. If the loss has not ``seen`` what is NaN its cotangents are 0.
    """
    tiling.CHUNKS_IN_A_PIECE, tiling.PROGRAMS_AT_ONCE = 1, 8
    case = Case(T=70, B=2, H=1, K=16, V=16)
    arrays, _, tokens, state = inputs(case, "float32")
    ids = jnp.asarray(np.arange(70) // 30 + np.zeros((2, 1), int)) if packed else None
    tokens = tokens._replace(resets=starts_of_segments(ids) if packed else None)
    cotangents = [jnp.asarray(c, jnp.float32) for c in helpers.draw_cotangents(arrays)]
    place, *numbers = BAD[name]
    bad = jnp.inf if name in ("v", "o") else jnp.nan
    if name == "initial_state":
        state = state.at[place].set(bad)
    elif name in ("o", "final_state"):
        index = ("o", "final_state").index(name)
        cotangents[index] = cotangents[index].at[place].set(bad)
    else:
        tokens = tokens._replace(**{name: getattr(tokens, name).at[place].set(bad)})

    def plain(*arrays):
        *tokens, state = arrays
        options = {"segment_ids": ids, "implementation": "recurrent"}
        return delta_product(*tokens, initial_state=state, **options)

    outputs, pullback = jax.vjp(plain, *tokens[:5], state)
    if not seen:
        pairs = zip(cotangents, outputs, strict=True)
        cotangents = [jnp.where(jnp.isnan(x), 0, c) for c, x in pairs]
    options = kernels.Options(case.K**-0.5, None, spans=2, interpret=False, more=more)
    run = {"kernel": choice, "options": options._replace(kernels=("triton",))}
    o, final_state, kept = containment.forward(tokens, state, **run, keep_states=True)
    dtokens, dstate = containment.backward(tokens, kept, *cotangents, **run)
    wanted = [*outputs, *pullback(tuple(cotangents))]
    found = [o, final_state, *dtokens[:5], dstate]
    pairs = list(zip(found, wanted, strict=True))
    zeros = lambda x: np.nan_to_num(np.asarray(x, np.float64), nan=0)
    return {
        "error": max(_relative(zeros(x), zeros(y)) for x, y in pairs),
        "alike": all(np.array_equal(np.isnan(x), np.isnan(y)) for x, y in pairs),
        "bad": int(np.isnan(o).any(axis=(2, 3)).sum()) == numbers[not packed],
    }


def told(inputs, kernel, dtype: str, T: int, R: int, raw: bool = False) -> bool:
    """Whether NaN stand where they should, of rows of which one query each is bad, and of a good.

    Behind it, to the end of the segment, outputs are NaN only if the kernel told.
    """
    at = {0: np.nan, 9: np.inf, T // 2: -np.inf, T - 1: np.nan}  # 9: at the start of a segment
    case = Case(T=T, R=R, B=len(at) + 1, H=1, G=2, K=16, V=20)
    _, _, tokens, state = inputs(case, dtype)
    segment = np.arange(T) // 9
    wanted, of_states = np.zeros((case.B, T), bool), np.zeros(case.B, bool)
    q = tokens.q
    for row, (t, bad) in enumerate(at.items()):
        q = q.at[row, t, 0, row].set(bad)
        wanted[row] = (segment == segment[t]) & (np.arange(T) >= t)
        of_states[row] = segment[t] == segment[-1]
    ids = jnp.asarray(np.broadcast_to(segment, (case.B, T)))
    g = tokens.g.at[:, 3].set(-jnp.inf)  # that is not bad
    tokens = tokens._replace(q=q, g=g, resets=starts_of_segments(ids))
    options = kernels.Options(case.K**-0.5, None, spans=1, interpret=False, raw=raw)
    o, final_state, _ = kernel.forward(tokens, state, options, keep_states=False)
    bad, bad_states = (np.isnan(np.asarray(x, np.float64)) for x in (o, final_state))
    alike = np.array_equal(bad, np.broadcast_to(wanted[:, :, None, None], bad.shape))
    return alike and np.array_equal(bad_states.all(axis=(1, 2, 3)), of_states)


def mended(inputs, in_place: bool) -> dict[str, float | bool]:
    """How far outputs of one head of four are from the contained recurrence; all others are 7."""
    case = Case(T=20, R=2, B=2, H=1, G=2, K=24, V=20)
    _, _, tokens, state = inputs(case, "float16")
    ids = jnp.asarray(np.arange(20) // 9 + np.zeros((2, 1), int))
    tokens = tokens._replace(
        resets=starts_of_segments(ids),
        v=tokens.v.at[0, 12, 1, 1, 3].set(jnp.inf),
        g=tokens.g.at[:, 10].set(-jnp.inf),
    )
    o = jnp.full((2, 20, 2, case.V), 7.0, tokens.v.dtype)
    states = jnp.zeros((2, 2, 2, case.K, case.V)).at[0, 1, 0].set(jnp.nan)  # after two pieces
    states = states.at[1, 0, 1].set(jnp.inf)  # something that overflowed

    def call(name, *arrays, **options):
        return triton_interpreter.call(name + "_in_place" * in_place, *arrays, **options)

    options = kernels.Options(case.K**-0.5, None, spans=1, interpret=False)
    told = jnp.zeros((2, 2, 3), jnp.float32)
    o, final = mend.mended(call, tokens, state, told, o, states, options, block=8)
    how = {"initial_state": state, "segment_ids": ids, "implementation": "recurrent"}
    want, of_want = (np.asarray(x, np.float64) for x in delta_product(*tokens[:5], **how))
    o, final = np.asarray(o, np.float64), np.asarray(final)
    rest = np.delete(o.transpose(0, 2, 1, 3).reshape(4, -1), 1, axis=0)
    zeros = lambda x: np.nan_to_num(x[0, 8:, 1], nan=0)
    return {
        "error": max(_relative(zeros(o), zeros(want)), _relative(final[0, 1], of_want[0, 1])),
        "alike": np.array_equal(np.isnan(o[0, 8:, 1]), np.isnan(want[0, 8:, 1])),
        "bad": bool(np.isnan(want[0, 12:18, 1]).all()),
        "rest": bool((rest == 7).all() and (o[0, :8, 1] == 7).all()),  # and tokens before its block
        "states": bool((final[0, 0] == 0).all() and np.isinf(final[1, 0]).all()),
    }


def _relative(x, reference) -> float:
    return float(np.linalg.norm(x - reference) / max(np.linalg.norm(reference), 1e-300))
