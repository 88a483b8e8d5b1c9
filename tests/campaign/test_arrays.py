"""Arrays at random: good ones against float64, and bad ones, which get one error that names them.

Shapes, kinds of gates and keys, packing and cuts are drawn together, where the tests of the op have
them one by one. A bad call differs from a good one in one argument; what it raises is one line, is
no error of JAX's, and says which argument it was.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bars import GRADIENTS, OUTPUTS, assert_within_bars
from campaign.damage import cases
from flax import nnx
from helpers import IMPLEMENTATIONS, Case, cast, errors, relative_error
from hypothesis import given
from hypothesis import strategies as st

from deltaproduct_jax import GatedDeltaProduct
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.ops import carry_state, delta_product, delta_product_step

pytestmark = pytest.mark.slow

GATES = [None, "mild", "slow", "zero", "strong", "every8", "extreme", "mixed"]
KINDS_OF_KEYS = ["unit", "identical", "parallel"]


@st.composite
def good_cases(draw, longest=40):
    """Any of what the op takes, small enough to compile.

    What is made a unit vector has two numbers or more: of one, see below.
    """
    l2norm = draw(st.booleans())
    sizes = {
        name: draw(st.integers(*bounds))
        for name, bounds in {
            "T": (1, longest), "R": (1, 5), "B": (1, 2), "H": (1, 2), "G": (1, 3),
            "K": (1 + l2norm, 9), "V": (1, 9), "seed": (0, 99),
        }.items()
    }  # fmt: skip
    return Case(
        **sizes,
        gate=draw(st.sampled_from(GATES)),
        beta=draw(st.sampled_from([(0.0, 1.0), (0.0, 2.0), (2.0, 2.0), (0.0, 0.0)])),
        keys=draw(st.sampled_from(KINDS_OF_KEYS)),
        state=draw(st.booleans()),
        segments=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 1.0, -0.3])),
        l2norm=l2norm,
        chunk_size=draw(st.sampled_from([None, 1, 3, 8, 64])),
    )


@cases(60)
@given(case=good_cases(), implementation=st.sampled_from(IMPLEMENTATIONS))
def test_good_arrays_give_what_float64_gives(case, implementation):
    """Outputs and the gradient of every argument, within the bars of the design."""
    assert_within_bars(case, implementation, "float32")
    jax.clear_caches()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_vectors_of_one_number_that_are_made_unit_vectors(implementation):
    """They are 1e-6 of the two terms whose difference they are, which rounding takes 6e-8 of.

    The 1e-6 is what is added to the square: without it, the gradient would be 0. No other gradient
    goes through the normalisation.
    """
    case = Case(T=12, B=1, H=1, K=1, V=3, keys="identical", l2norm=True)
    of_outputs, of_gradients = errors(case, implementation, "float32")
    through = {name: of_gradients.pop(name) for name in ("dq", "dk")}
    assert 1e-3 < max(through.values()) < 0.3
    assert max(of_outputs.values()) <= OUTPUTS["float32"]
    assert max(of_gradients.values()) <= GRADIENTS["float32"]


@cases(40)
@given(data=st.data(), case=good_cases(), implementation=st.sampled_from(IMPLEMENTATIONS))
def test_any_cuts_of_a_packed_row_change_nothing(data, case, implementation):
    """Two cuts, of which a piece may be empty, by an implementation of its own each."""
    arrays = {n: x for n, x in cast(case.arrays(), "float32").items() if x is not None}
    state = arrays.pop("initial_state", None)
    ids = case.segment_ids()
    if ids is None:
        ids = np.zeros((case.B, case.T), int)
    how = {"scale": case.scale, "use_qk_l2norm": case.l2norm}
    o, final = delta_product(
        **arrays, **how, segment_ids=ids, initial_state=state, implementation=implementation
    )
    cuts = sorted(data.draw(st.tuples(*2 * [st.integers(0, case.T)])))
    outputs, before = [], None
    for start, stop in zip([0, *cuts], [*cuts, case.T], strict=True):
        if before is not None and 0 < start < case.T and start != stop:
            state = carry_state(state, ids[:, before], ids[:, start])
        o_piece, state = delta_product(
            **{name: x[:, start:stop] for name, x in arrays.items()}, **how,
            segment_ids=ids[:, start:stop], initial_state=state,
            implementation=data.draw(st.sampled_from(IMPLEMENTATIONS)),
        )  # fmt: skip
        outputs.append(o_piece)
        before = stop - 1 if stop > 0 else None
    assert relative_error(jnp.concatenate(outputs, axis=1), o) < 1e-4
    assert relative_error(state, final) < 1e-4
    jax.clear_caches()


B, T, R, H, K, V, D = 2, 6, 2, 2, 4, 3, 8


def shaped(*shape, dtype=np.float32):
    return np.full(shape, 0.5, dtype)


def op_arguments():
    return {
        "q": shaped(B, T, H, K), "k": shaped(B, T, R, H, K), "v": shaped(B, T, R, 2 * H, V),
        "beta": shaped(B, T, R, 2 * H), "g": -shaped(B, T, 2 * H),
        "initial_state": shaped(B, 2 * H, K, V), "segment_ids": np.zeros((B, T), int),
    }  # fmt: skip


def step_arguments():
    of_token = {n: x[:, 0] for n, x in op_arguments().items() if n in ("q", "k", "v", "beta", "g")}
    return {"state": shaped(B, 2 * H, K, V), **of_token}


@functools.cache
def layer():
    return GatedDeltaProduct(D, num_heads=2, num_v_heads=4, head_dim=4, rngs=nnx.Rngs(0))


@functools.cache
def model():
    sizes = {"hidden_size": D, "num_heads": 2, "head_dim": 4, "intermediate_size": 8}
    return SequenceModel(ModelConfig(vocab_size=5, num_layers=1, **sizes), rngs=nnx.Rngs(0))


TARGETS = {
    "op": (delta_product, op_arguments),
    "step": (delta_product_step, step_arguments),
    "layer": (
        lambda **given: layer()(given.pop("x"), **given),
        lambda: {
            "x": shaped(B, T, D), "mask": np.ones((B, T), bool),
            "segment_ids": np.zeros((B, T), int),
        },
    ),
    "one token of a layer": (
        lambda **given: layer().step(layer().init_state(B), given.pop("x"), **given),
        lambda: {"x": shaped(B, D)},
    ),
    "model": (
        lambda **given: model()(given.pop("tokens"), **given),
        lambda: {"tokens": np.zeros((B, T), int), "segment_ids": np.zeros((B, T), int)},
    ),
}  # fmt: skip
NO_ARRAYS = ["a", "0.5", {"a": 1}, object(), float, 1 + 2j, np.array(["a"]), [[1.0], [1.0, 2.0]]]
OPTIONS = {
    "chunk_size": [0, -1, 2.5, True, "8", float("nan"), [8]],
    "implementation": ["zz", 1, True, "", ("chunked",), "CHUNKED"],
    "precision": ["zz", 3.5, object()],
    "scale": [float("nan"), float("inf"), -float("inf"), "a", [1.0, 2.0]],
    "use_qk_l2norm": ["no", 1, None, 0.0],
}


def spoilt(data, x):
    """The array with one thing wrong: an axis more, less, longer or shorter, or its dtype."""
    axis = data.draw(st.integers(0, x.ndim - 1))
    kind = data.draw(st.sampled_from(["more", "less", "longer", "shorter", "dtype", "none"]))
    if kind == "more":
        return np.expand_dims(x, axis)
    if kind == "less":
        return x.take(0, axis=axis)
    if kind == "longer":
        return np.concatenate([x, x, x.take([0], axis=axis)], axis=axis)
    if kind == "shorter":
        return x.take(range(x.shape[axis] - 1), axis=axis)
    if kind == "dtype":
        others = [np.float32] if x.dtype.kind in "bi" else [np.int32, bool]
        return x.astype(data.draw(st.sampled_from([*others, np.complex64, object, "U3"])))
    return data.draw(st.sampled_from(NO_ARRAYS))


def is_the_same_call(target, name, x):
    """Whether what was spoilt is a good call of another size."""
    first = {"layer": "x", "one token of a layer": "x", "model": "tokens"}.get(target, "")
    sizes_alone = isinstance(x, np.ndarray) and name == first and x.dtype.kind in "fi"
    return sizes_alone and x.ndim == TARGETS[target][1]()[name].ndim


def refusal(call, given):
    """The text of the one error of ours that a call ends in, or None."""
    try:
        call(**given)
    except (ValueError, TypeError) as error:
        text = str(error)
        assert "\n" not in text, text
        return text
    return None


@cases(400)
@given(data=st.data(), target=st.sampled_from(sorted(TARGETS)))
def test_a_bad_array_is_named(data, target, unchecked):
    call, arguments = TARGETS[target]
    given = arguments()
    name = data.draw(st.sampled_from(sorted(given)))
    given[name] = spoilt(data, given[name])
    text = refusal(call, given)
    if text is None:
        assert is_the_same_call(target, name, given[name]), (target, name, given[name])
        return
    others = [other for other in given if other != name]
    # Sizes that disagree are said of one of the two; a step has its state beside its arguments.
    assert any(word in text for word in [name, *others, "state."]), text
    assert "got" in text or "instead" in text or "must" in text, text


@cases(100)
@given(data=st.data(), name=st.sampled_from(sorted(OPTIONS)))
def test_a_bad_option_is_named(data, name, unchecked):
    value = data.draw(st.sampled_from(OPTIONS[name]))
    text = refusal(delta_product, op_arguments() | {name: value})
    assert text is not None, (name, value)
    assert name in text, text
    assert "must" in text or "may be" in text, text


@cases(80)
@given(data=st.data())
def test_arguments_of_a_step_that_are_swapped_are_named(data, unchecked):
    """Two of its arrays in each other's places, where their shapes differ."""
    given = step_arguments()
    one, other = data.draw(st.permutations(sorted(given)))[:2]
    if given[one].shape == given[other].shape:
        return
    given[one], given[other] = given[other], given[one]
    text = refusal(delta_product_step, given)
    assert text is not None, (one, other)
    assert any(name in text for name in given), text
