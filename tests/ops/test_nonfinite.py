"""What is not finite stays where it is: other rows, other segments and the tokens before it.

Every table runs one program per implementation; what is bad, and where, are data. All that is not
expected to be NaN must be what it is without the bad value, bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ARGUMENTS, IMPLEMENTATIONS, Case, cast, draw_cotangents, run

from deltaproduct_jax.ops import delta_product, selection, sharded_delta_product
from deltaproduct_jax.ops.containment import contained, only_finite
from deltaproduct_jax.ops.route import Route

CASE = Case(T=12, R=2, B=2, H=2, G=2, K=8, V=9)  # widths of a vector and more
IDS = np.array([[4] * 5 + [1] * 3 + [4] * 4, [0] * 7 + [3] * 5])
BOUNDS = ((0, 5, 8, 12), (0, 7, 12))
# "chunked" where another platform of the same program has a kernel.
BESIDE = "beside a kernel"
# What None runs of a gradient of many narrow states.
NARROW = "narrow"
# Compiled twice, as that of a row run again is: a CPU may add up the two in another order.
KERNEL = "pallas_tpu"
EVERY = [
    *IMPLEMENTATIONS,
    NARROW,
    *(pytest.param(name, marks=pytest.mark.slow) for name in (BESIDE, KERNEL)),
]
# Bad tokens of row 0: the first of a row, of a segment, inside one, the last of one, of a row.
PLACES = (0, 5, 6, 7, 11)


def segment_of(row, t):
    """First token of the segment that a token lies in, and the first behind it."""
    bounds = BOUNDS[row]
    return max(b for b in bounds if b <= t), min(b for b in bounds if b > t)


@functools.cache
def clean(implementation, last=CASE.T):
    """Arrays, cotangents that are 0 from token ``last`` of row 0 on in its segment, and results."""
    arrays = cast(CASE.arrays(), "float32")
    do, dstate = draw_cotangents(arrays)
    if last < CASE.T:
        end = segment_of(0, last)[1]
        do[0, last:end] = 0
        if end == CASE.T:
            dstate[0] = 0
    return arrays, (do, dstate), results(implementation, arrays, (do, dstate))


def results(implementation, arrays, cotangents, segment_ids=IDS):
    """Outputs, final state and gradients by name."""
    options = {"implementation": implementation}
    if implementation in ("chunked", BESIDE):  # of which each is traced once
        size = 4 if implementation == "chunked" else 6
        options = {"implementation": "chunked", "chunk_size": size}
    if implementation == NARROW:  # with a precision that no other program of this file names
        options = {"precision": "highest"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "GRADIENT_FROM_STATES", 1)
        if implementation == BESIDE:
            patch.setattr(Route, "may_run_kernel", True)
        (o, state), gradients = run(arrays, cotangents, segment_ids=segment_ids, **options)
    return {"o": o, "final_state": state} | {f"d{n}": x for n, x in gradients.items()}


def poisoned(x, index, value):
    x = np.array(x)
    x[index] = value
    return x


def check(found, expected, bad_outputs, bad_gradients, bad_state, bad_start, implementation=None):
    """NaN exactly there, and what was expected everywhere else.

    Args:
      found, expected: what `results` returns.
      bad_outputs, bad_gradients: tokens of row 0.
      bad_state, bad_start: whether row 0's final state, the initial one's gradient, are NaN.
      implementation: what was run.
    """
    tolerance = 1e-5 if implementation == KERNEL else 0
    for name, x in found.items():
        is_nan = np.zeros(x.shape, bool)
        if name in ("final_state", "dinitial_state"):
            is_nan[0] = bad_state if name == "final_state" else bad_start
        else:
            is_nan[0, bad_outputs if name == "o" else bad_gradients] = True
        heads = {"o": 2, "dq": 2, "dg": 2, "final_state": 1, "dinitial_state": 1}.get(name, 3)
        # Value heads 0 and 1 belong to key head 0.
        mine = [
            slice(0, 1 if name in ("dq", "dk") else 2) if a == heads else slice(None)
            for a in range(x.ndim)
        ]
        others = np.ones(x.shape, bool)
        others[tuple(mine)] = False
        is_nan &= ~others
        np.testing.assert_array_equal(np.isnan(x), is_nan, err_msg=name)
        rest, wanted = x[~is_nan], expected[name][~is_nan]
        np.testing.assert_allclose(rest, wanted, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_bad_operand_reaches_the_rest_of_its_segment(implementation):
    arrays, cotangents, expected = clean(implementation)
    for name in ARGUMENTS[:5]:
        for place, value in zip(PLACES, (np.nan, np.inf, np.nan, -np.inf, np.inf), strict=True):
            if name == "g" and value < 0:
                value = np.inf  # -inf forgets, and is not bad
            # Both value heads of key head 0, as a bad key would have it.
            index = {"q": (0, place, 0, 1), "g": (0, place, slice(0, 2))}.get(
                name, (0, place, 1, slice(0, 1 if name == "k" else 2))
            )
            bad = arrays | {name: poisoned(arrays[name], index, value)}
            start, end = segment_of(0, place)
            found = results(implementation, bad, cotangents)
            check(
                found,
                expected,
                slice(place, end),
                slice(start, end),
                end == CASE.T,
                start == 0,
                implementation,
            )


@pytest.mark.parametrize("implementation", EVERY)
def test_a_bad_state_reaches_the_first_segment(implementation):
    arrays, cotangents, expected = clean(implementation)
    bad = arrays | {"initial_state": poisoned(arrays["initial_state"], (0, slice(0, 2), 1), np.inf)}
    found = results(implementation, bad, cotangents)
    check(found, expected, slice(0, 5), slice(0, 5), False, True, implementation)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_bad_cotangent_reaches_the_tokens_before_it(implementation):
    arrays, (do, dstate), expected = clean(implementation)
    for place in PLACES:
        bad = poisoned(do, (0, place, slice(0, 2), 2), np.nan), dstate
        start = segment_of(0, place)[0]
        found = results(implementation, arrays, bad)
        check(found, expected, slice(0), slice(start, place + 1), False, start == 0, implementation)
    bad = do, poisoned(dstate, (0, slice(0, 2), 1, 1), -np.inf)
    found = results(implementation, arrays, bad)
    check(found, expected, slice(0), slice(8, 12), False, False, implementation)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_loss_of_what_stands_before_is_exact(implementation):
    """Its cotangents are 0 from the bad token to the end of the segment."""
    for place in PLACES:
        arrays, cotangents, expected = clean(implementation, place)
        bad = arrays | {"v": poisoned(arrays["v"], (0, place, 0, slice(0, 2), 0), np.nan)}
        end = segment_of(0, place)[1]
        found = results(implementation, bad, cotangents)
        check(found, expected, slice(place, end), slice(0), end == CASE.T, False, implementation)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_decay_of_minus_infinity_forgets_everything(implementation):
    arrays, cotangents, _ = clean(implementation)
    arrays = arrays | {"g": poisoned(arrays["g"], (slice(None), slice(1, 12, 3)), -np.inf)}
    found = results(implementation, arrays, cotangents)
    arrays["g"] = np.maximum(arrays["g"], -200)  # exp of it is 0 in float32
    expected = results(implementation, arrays, cotangents)
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
    o = found["o"]
    arrays["v"] = poisoned(arrays["v"], (slice(None), 0), 1e3)
    np.testing.assert_array_equal(results(implementation, arrays, cotangents)["o"][:, 1:], o[:, 1:])


@pytest.mark.parametrize("implementation", ["recurrent", "associative"])
def test_a_state_that_overflows_stays_in_its_segment(implementation):
    arrays, cotangents, expected = clean(implementation)
    expected = expected["o"]
    arrays = arrays | {"k": poisoned(arrays["k"], (0, slice(1, 3)), 3e16)}
    o = results(implementation, arrays, cotangents)["o"]
    assert not np.isfinite(o[0, 2:5]).any()
    np.testing.assert_array_equal(o[0, 5:], expected[0, 5:])
    np.testing.assert_array_equal(o[1], expected[1])


def test_what_overflows_inside_a_chunk_reaches_no_earlier_chunk_row_or_head():
    arrays, cotangents, expected = clean("chunked")
    arrays = arrays | {"k": poisoned(arrays["k"], (0, slice(9, 11), slice(None), 0), 3e16)}
    o = results("chunked", arrays, cotangents)["o"]
    assert not np.isfinite(o[0, 11, :2]).any()
    is_exact = np.ones(o.shape, bool)
    is_exact[0, 8:, :2] = False  # the chunk, of the two value heads of key head 0
    np.testing.assert_array_equal(o[is_exact], expected["o"][is_exact])


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (-np.inf, "bfloat16")])
def test_it_is_seen_wherever_it_stands(value, dtype):
    """Of as many numbers as XLA hands to a library, whose maximum overlooks NaN."""
    B, T, R, H, K = 1, 128, 4, 2, 64

    @jax.jit
    def spoil(x):
        run = lambda x, state: (jnp.sum(only_finite(x), axis=2), state)
        return contained(run, x, jnp.zeros((B, H, 1, 1)), None, head_axes=3, asks_first=True)

    x = jnp.ones((B, T, R, H, K), dtype)
    for place in (0, 7, 8, 37, 63):
        o, state = spoil(x.at[0, 70, 2, 1, place].set(value))
        is_nan = np.zeros(o.shape, bool)
        is_nan[0, 70:, 1] = True
        np.testing.assert_array_equal(np.isnan(o.astype(np.float32)), is_nan)
        np.testing.assert_array_equal(np.isnan(state)[0, :, 0, 0], [False, True])
    # A square of this is infinite, and it is finite itself.
    assert np.isfinite(spoil(x.at[0, 70, 2, 1, 5].set(1e30))[0].astype(np.float32)).all()


@pytest.mark.parametrize("beside", [True, False])
def test_what_none_runs_of_narrow_states(beside, monkeypatch):
    """One of two loops, by whether anything is bad: of both the same bits. Beside a kernel too."""
    monkeypatch.setattr(Route, "may_run_kernel", beside)
    arrays, _, _ = clean("recurrent")
    bad = arrays | {"k": poisoned(arrays["k"], (0, 6, 1, 0, 2), np.inf)}
    op = lambda arrays: jax.jit(lambda a: delta_product(**a, segment_ids=IDS))(arrays)
    (found, state), (expected, _) = op(bad), op(arrays)
    is_nan = np.zeros(found.shape, bool)
    is_nan[0, 6:8, :2] = True
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found[~is_nan], expected[~is_nan])
    assert np.isfinite(state).all()


@functools.partial(jax.jit, static_argnames="mesh")
def over_a_mesh(arrays, cotangents, mesh):
    def op(arrays):
        return sharded_delta_product(
            **arrays, segment_ids=IDS, mesh=mesh, sequence_axis="s", implementation="recurrent"
        )

    outputs, pullback = jax.vjp(op, arrays)
    return outputs, pullback(cotangents)[0]


def test_pieces_of_a_sequence_on_several_devices():
    """Pieces of 3 tokens: what is bad crosses their edges within its segment."""
    mesh = jax.make_mesh((4,), ("s",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays, cotangents, _ = clean("recurrent")
    cotangents = tuple(x.astype(np.float32) for x in cotangents)

    def found(arrays, cotangents):
        (o, state), gradients = over_a_mesh(arrays, cotangents, mesh)
        return {"o": o, "final_state": state} | {f"d{n}": x for n, x in gradients.items()}

    expected = found(arrays, cotangents)
    for place in PLACES:
        start, end = segment_of(0, place)
        bad = arrays | {"v": poisoned(arrays["v"], (0, place, 0, slice(0, 2), 1), np.nan)}
        places = slice(place, end), slice(start, end), end == CASE.T, start == 0
        check(jax.device_get(found(bad, cotangents)), jax.device_get(expected), *places)
        bad = poisoned(cotangents[0], (0, place, slice(0, 2), 1), np.inf), cotangents[1]
        places = slice(0), slice(start, place + 1), False, start == 0
        check(jax.device_get(found(arrays, bad)), jax.device_get(expected), *places)
    bad = arrays | {"initial_state": poisoned(arrays["initial_state"], (0, slice(0, 2)), np.nan)}
    places = slice(0, 5), slice(0, 5), False, True
    check(jax.device_get(found(bad, cotangents)), jax.device_get(expected), *places)
