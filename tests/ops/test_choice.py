"""What is chosen where nothing is named: by platform and shape, once for every call."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Case, cast

from deltaproduct_jax.ops import (
    default_chunk_size,
    delta_product,
    dispatch,
    route,
    select_implementation,
    selection,
)


def inputs(**sizes):
    arrays = cast(Case(B=1, **sizes).arrays(), "float32")
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def test_the_choice_can_be_asked_and_is_the_one_that_runs():
    size = {"B": 1, "T": 64, "R": 2, "Hv": 4, "K": 64, "V": 64, "differentiated": False}

    def choice(platform, **sizes):
        return select_implementation(platform, **{**size, **sizes})

    assert choice("cpu") == "recurrent"
    assert choice("cpu", R=1) == choice("cpu", R=1, K=32, V=64) == "recurrent"
    assert choice("cpu", R=1, V=128) == "chunked"
    assert choice("cpu", K=128, V=128) == choice("cpu", K=128, V=128, R=3) == "chunked"
    assert choice("cpu", B=8) == choice("cpu", K=128, V=64) == "recurrent"
    assert choice("cpu", B=128, R=3) == "recurrent"
    assert choice("cpu", B=1024, K=32, V=32) == "recurrent"
    assert choice("cpu", differentiated=True) == "chunked"
    narrow = {"differentiated": True, "B": 4, "K": 32, "V": 32}
    assert choice("cpu", **narrow) == choice("cpu", **narrow | {"R": 4}) == "recurrent"
    assert choice("cpu", **narrow | {"B": 3}) == choice("cpu", **narrow | {"V": 33}) == "chunked"
    one_factor = narrow | {"R": 1, "K": 16, "V": 16}
    assert choice("cpu", **one_factor) == "recurrent"
    assert choice("cpu", **one_factor | {"V": 17}) == "chunked"
    assert choice("tpu", **narrow) == choice("cpu", **narrow | {"T": 1}) == "chunked"
    assert choice("tpu", T=1) == "recurrent"
    assert choice("tpu") == "chunked"  # nothing here says which TPU
    with pytest.raises(ValueError, match="'gpu' is not known; it may be one of 'cpu', 'cuda'"):
        choice("gpu")
    arrays = inputs(T=64, K=32, V=32)

    def lowered(implementation, platform):
        fn = jax.jit(lambda a: delta_product(**a, implementation=implementation))
        text = fn.trace(arrays).lower(lowering_platforms=(platform,)).as_text()
        return text.count("dot_general"), text.count("exponential")

    # Lowered for a platform other than the one that traces, the choice follows the platform.
    # Without a gradient there are two loops over tokens, of which one runs (recurrent.py).
    dots, exponentials = lowered("recurrent", "cpu")
    asked_first = len(arrays) - 1  # products of all arrays but the state
    assert lowered(None, "cpu") == (2 * dots - asked_first, 2 * exponentials)
    assert lowered(None, "tpu") == lowered("chunked", "tpu")
    assert lowered("chunked", "cpu") != lowered("recurrent", "cpu")


def test_the_gradient_of_many_narrow_states_is_that_of_the_scan(monkeypatch):
    monkeypatch.setattr(selection, "GRADIENT_FROM_STATES", 2)
    sizes = {"T": 70, "H": 1, "G": 2, "R": 2, "K": 8, "V": 6}  # two spans, of which one is padded
    arrays, ids = inputs(**sizes), jnp.asarray(Case(B=1, **sizes, segments=True).segment_ids())

    def both(implementation):
        def run(arrays):
            return delta_product(**arrays, segment_ids=ids, implementation=implementation)

        outputs, pullback = jax.vjp(run, arrays)
        return outputs, pullback(jax.tree.map(jnp.cos, outputs))

    forward, backward = dispatch.PLAIN["recurrent"]
    seen = []

    def watched(form):
        return lambda *args, **options: seen.append(form) or form(*args, **options)

    monkeypatch.setitem(dispatch.PLAIN, "recurrent", (watched(forward), watched(backward)))
    chex.assert_trees_all_close(both(None), both("recurrent"), rtol=1e-5, atol=1e-6)
    assert seen == [forward, forward, backward]  # without a gradient, and with one


def test_a_call_is_resolved_once(monkeypatch):
    """Whatever is traced of it, primal, forward or backward pass, follows from one resolution."""
    asked, select = [], route.select_implementation

    def counted(platform, **sizes):
        asked.append((platform, sizes["differentiated"]))
        return select(platform, **sizes)

    monkeypatch.setattr(route, "select_implementation", counted)
    arrays = inputs(T=9, K=5, V=3)
    jax.jit(jax.grad(lambda a: jnp.sum(delta_product(**a)[0]))).trace(arrays)
    assert len(asked) == len(set(asked)) == 8  # four platforms, with a gradient and without


def test_default_chunk_size_follows_state_dtype_and_platform():
    def size(platform, dtype, **sizes):
        return default_chunk_size(platform, dtype, **{"T": 999, "R": 2, "K": 64, "V": 64} | sizes)

    assert size("cpu", "float32") == 16
    assert size("cpu", "float32", K=16, V=16) == 8
    assert size("cpu", "bfloat16", R=3) == 8
    assert size("tpu", "float32", R=100) == 1
    assert size("tpu", "bfloat16") == 64
    assert size("tpu", "bfloat16", T=40) == 40
    assert size("default", "bfloat16") == size("cuda", "bfloat16") == 32


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint64])
def test_numbers_of_numpy_are_those_of_python(kind):
    """Narrow ones overflow in the sums and products that cut a sequence, and against bounds."""
    arrays = inputs(T=300)

    def program(chunk_size, scale):
        run = lambda arrays: delta_product(**arrays, chunk_size=chunk_size, scale=scale)
        return str(jax.make_jaxpr(run)(arrays))

    assert program(kind(100), np.float16(0.5)) == program(100, 0.5)
