"""What must not change the result, whatever the implementation: properties, not examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import IMPLEMENTATIONS, WITH_KERNELS, Case, cast, draw_cotangents, relative_error, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quick import quick

from deltaproduct_jax.ops import carry_state, delta_product, delta_product_step

# Two results that differ by rounding only.
ROUNDING = 3e-6
T = 18
CASE = Case(T=T, R=2, B=2, H=1, G=2, K=4, V=5)
few = settings(max_examples=5, derandomize=True, deadline=None)
every_implementation = pytest.mark.parametrize("implementation", WITH_KERNELS)
# The kernel is interpreted, which takes seconds.
quick_implementations = pytest.mark.parametrize(
    "implementation", quick(WITH_KERNELS, IMPLEMENTATIONS)
)


def inputs(case=CASE):
    return {name: x for name, x in cast(case.arrays(), "float32").items() if x is not None}


def tokens(arrays, start, stop):
    return {name: x[:, start:stop] for name, x in arrays.items() if name != "initial_state"}


def assert_same(x, y, tolerance=ROUNDING):
    assert relative_error(x, y) <= tolerance


@few
@example(cut=9, packed=True)  # A boundary of one row and not of the other.
@given(cut=st.integers(0, T), packed=st.booleans())
def test_cutting_a_sequence_and_passing_the_state_on(cut, packed):
    arrays = inputs()
    ids = np.stack([np.arange(T) // 3 % 2, np.arange(T) // 5]) if packed else np.zeros((2, T), int)
    options = {"implementation": "chunked", "chunk_size": 8}
    o, final = delta_product(**arrays, segment_ids=ids, **options)
    o1, state = delta_product(
        **tokens(arrays, 0, cut),
        segment_ids=ids[:, :cut],
        initial_state=arrays["initial_state"],
        **options,
    )
    if 0 < cut < T:
        state = carry_state(state, ids[:, cut - 1], ids[:, cut])
    o2, state = delta_product(
        **tokens(arrays, cut, T), segment_ids=ids[:, cut:], initial_state=state, **options
    )
    assert_same(jnp.concatenate([o1, o2], axis=1), o)
    assert_same(state, final)


@quick_implementations
def test_prefill_then_steps(implementation):
    arrays = inputs()
    o, final = delta_product(**arrays, implementation=implementation)
    first, rest = tokens(arrays, 0, 12), tokens(arrays, 12, T)
    o1, state = delta_product(
        **first, initial_state=arrays["initial_state"], implementation=implementation
    )
    outputs, step = [o1], jax.jit(delta_product_step)
    for t in range(T - 12):
        o_t, state = step(state, **{name: x[:, t] for name, x in rest.items()})
        outputs.append(o_t[:, None])
    assert_same(jnp.concatenate(outputs, axis=1), o)
    assert_same(state, final)


@pytest.mark.slow
def test_chunk_size_changes_neither_outputs_nor_gradients():
    arrays, ids = inputs(), Case(T=T, B=2, segments=True).segment_ids()
    cotangents = tuple(c.astype(np.float32) for c in draw_cotangents(arrays))
    expected = run(arrays, cotangents, segment_ids=ids, implementation="recurrent")
    for chunk_size in (1, 7, 200):
        outputs, gradients = run(
            arrays, cotangents, segment_ids=ids, implementation="chunked", chunk_size=chunk_size
        )
        for x, y in zip(outputs, expected[0], strict=True):
            assert_same(x, y)
        for name, x in gradients.items():
            assert_same(x, expected[1][name])


@few
@given(
    bounds=st.sets(st.integers(1, T - 1), min_size=1, max_size=3),
    returning=st.booleans(),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
def test_packed_equals_separate(bounds, returning, implementation):
    """One packed row against rows of one sequence each, zero behind their ends."""
    arrays = inputs(Case(T=T, R=2, B=1, H=1, G=2, K=4, V=5))
    bounds = [0, *sorted(bounds), T]
    lengths = np.diff(bounds)
    ids = np.repeat(np.arange(len(lengths)) % (2 if returning else 9), lengths)[None]
    o, final = delta_product(**arrays, segment_ids=ids, implementation=implementation)
    rows = {}
    for name, x in tokens(arrays, 0, T).items():
        rows[name] = np.zeros((4, *x.shape[1:]), x.dtype)
        for i, length in enumerate(lengths):
            rows[name][i, :length] = x[0, bounds[i] : bounds[i + 1]]
    state = np.zeros((4, *arrays["initial_state"].shape[1:]), np.float32)
    state[0] = arrays["initial_state"][0]
    o_rows, finals = delta_product(**rows, initial_state=state, implementation=implementation)
    separate = [o_rows[i, :length] for i, length in enumerate(lengths)]
    assert_same(o[0], jnp.concatenate(separate))
    assert_same(final[0], finals[len(lengths) - 1])


@quick_implementations
def test_order_of_the_batch_and_padding(implementation):
    arrays = inputs()
    o, final = delta_product(**arrays, implementation=implementation)
    flipped = delta_product(
        **{name: x[::-1] for name, x in arrays.items()}, implementation=implementation
    )
    assert_same(flipped[0][::-1], o)
    # Behind the end: no write, no decay, and keys and values of any kind.
    padded = {
        name: np.concatenate([x, np.full_like(x[:, :5], 0 if name in ("beta", "g") else 3)], axis=1)
        for name, x in tokens(arrays, 0, T).items()
    }
    o_padded, final_padded = delta_product(
        **padded, initial_state=arrays["initial_state"], implementation=implementation
    )
    assert_same(o_padded[:, :T], o)
    assert_same(final_padded, final)


@every_implementation
def test_no_step_and_no_decay_leave_the_state_alone(implementation):
    arrays = inputs()
    arrays["beta"], arrays["g"] = np.zeros_like(arrays["beta"]), np.zeros_like(arrays["g"])
    _, final = delta_product(**arrays, implementation=implementation)
    np.testing.assert_array_equal(final, arrays["initial_state"])


@few
@given(seed=st.integers(0, 99), implementation=st.sampled_from(IMPLEMENTATIONS))
def test_factors_of_step_size_zero_do_nothing(seed, implementation):
    """Three factors per token, only one of them (another for every token) with a step size."""
    arrays = inputs(Case(T=T, R=3, K=4, V=4))
    active = np.random.default_rng(seed).integers(0, 3, size=T)
    mask = (np.arange(3) == active[:, None])[None, :, :, None]
    o, final = delta_product(
        **{**arrays, "beta": np.where(mask, arrays["beta"], np.float32(0))},
        implementation=implementation,
    )
    one = {name: arrays[name][:, np.arange(T), active][:, :, None] for name in ("k", "v", "beta")}
    o_one, final_one = delta_product(**{**arrays, **one}, implementation=implementation)
    assert_same(o, o_one)
    assert_same(final, final_one)


@few
@given(seed=st.integers(0, 99), top=st.sampled_from([0.5, 1.0, 2.0]))
def test_the_homogeneous_state_never_grows(seed, top):
    arrays = inputs(Case(T=T, R=2, gate=None, beta=(0.0, top), seed=seed))
    arrays["v"] = np.zeros_like(arrays["v"])
    before = np.linalg.norm(arrays["initial_state"], ord=2, axis=(-2, -1))
    for implementation in IMPLEMENTATIONS:
        _, final = delta_product(**arrays, implementation=implementation)
        after = np.linalg.norm(np.asarray(final), ord=2, axis=(-2, -1))
        assert np.all(after <= before * (1 + 1e-5)), implementation


@every_implementation
def test_a_reflection_undoes_itself(implementation):
    """beta = 2, v = 0: each factor is a reflection, and twice the same one is the identity."""
    arrays = inputs(Case(T=T, R=2, gate=None, beta=(2.0, 2.0)))
    arrays["k"] = np.repeat(arrays["k"][:, :, :1], 2, axis=2)
    arrays["v"] = np.zeros_like(arrays["v"])
    _, final = delta_product(**arrays, implementation=implementation)
    assert_same(final, arrays["initial_state"], 1e-5)


def test_no_output_depends_on_a_later_token():
    arrays = inputs()
    o, _ = delta_product(**arrays, implementation="chunked", chunk_size=8)
    for t in (1, 11, T - 1):
        later = {n: x.copy() for n, x in arrays.items()}
        for name in ("q", "k", "v", "beta", "g"):
            later[name][:, t] *= np.float32(0.3)
        o_later, _ = delta_product(**later, implementation="chunked", chunk_size=8)
        np.testing.assert_array_equal(o_later[:, :t], o[:, :t])
        assert relative_error(o_later[:, t], o[:, t]) > 1e-3


@quick_implementations
def test_grouped_heads_equal_repeated_keys(implementation):
    arrays = inputs(Case(T=9, R=2, H=2, G=3, K=4, V=4))
    repeated = {
        **arrays,
        "q": np.repeat(arrays["q"], 3, axis=2),
        "k": np.repeat(arrays["k"], 3, axis=3),
    }
    for x, y in zip(
        delta_product(**arrays, implementation=implementation),
        delta_product(**repeated, implementation=implementation),
        strict=True,
    ):
        assert_same(x, y)


def test_the_same_call_twice_is_equal_in_every_bit():
    arrays = inputs()
    for x, y in zip(delta_product(**arrays), delta_product(**arrays), strict=True):
        np.testing.assert_array_equal(x, y)
