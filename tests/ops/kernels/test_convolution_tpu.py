"""The TPU kernels of short convolutions as a CPU interprets them, and compiled ahead of time."""

import functools

import jax
import jax.numpy as jnp
import pytest
from ops.kernels import convolution_cases
from ops.kernels.convolution_cases import (
    MESHES,
    Case,
    layer,
    made,
    mapped,
    meshed,
    over_explicit_axes,
    silu,
)
from quick import quick

from deltaproduct_jax.ops.convolution import dispatch, selection
from deltaproduct_jax.ops.convolution.plain import Form, identity
from deltaproduct_jax.ops.kernels.pallas import convolution_passes

TPU = "pallas_tpu"
WIDE = functools.partial(Case, C=256)
CASES = {
    "SiLU and unit length, packed": WIDE(Form(silu, 128), packed=True, T=37),
    "SiLU, three taps, bfloat16": WIDE(Form(silu), dtype="bfloat16", W=3, T=32),
    "SiLU and unit length, bfloat16": WIDE(Form(silu, 128), dtype="bfloat16", packed=True, T=21),
    "SiLU, packed": WIDE(Form(silu), packed=True, T=33),
    "heads of several groups, an odd number": Case(Form(silu, 256), C=768, T=21),
    "several heads in a group": WIDE(Form(silu, 32), packed=True, T=17),
    "sum alone, two taps": WIDE(Form(identity), W=2, T=20),
    "unit length alone, five taps, bfloat16": WIDE(Form(identity, 64), dtype="bfloat16", W=5, T=18),
    "fewer tokens than taps": WIDE(Form(silu, 128), T=2, packed=True),
    "one token": WIDE(Form(silu, 128), T=1),
}
QUICK = tuple(CASES)[:1]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Of 16 tokens, so that a few of them make several blocks."""
    monkeypatch.setattr(convolution_passes, "MOST_TOKENS", 16)


def both(form, u, before, taps, run, past, dy):
    """Outputs and cotangents of the kernels."""
    run_kernels = lambda u, before, taps: dispatch.short_convolution(
        selection.by_name(TPU), form, u, before, taps, run, past
    )
    y, pull = jax.vjp(run_kernels, u, before, taps)
    return y, *pull(dy)


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_outputs_and_gradients_are_those_of_the_oracle(name):
    case = CASES[name]
    found = {name: (case.dtype, convolution_cases.errors(case, both))}
    assert not convolution_cases.over_the_bar(found)


@pytest.mark.slow
@pytest.mark.parametrize("width", [128, 64])
def test_what_is_not_a_number_stays_in_its_reach(width):
    """Behind the last token of a row too, where a block is not full."""
    case = WIDE(Form(silu, width), B=1, T=18)
    u, before, taps, run, past, dy = case.arrays()
    y, du, *_ = both(case.form, u.at[0, 3, 5].set(jnp.nan), before, taps, run, past, dy)
    reached = jnp.isnan(y[..., :width]).any((0, 2))
    assert reached.tolist() == [3 <= t < 3 + case.W for t in range(18)]
    assert not jnp.isnan(y[..., width:]).any()
    assert not jnp.isnan(du[:, 3 + case.W :]).any()
    assert not jnp.isnan(du[..., width:]).any()


@pytest.mark.slow
def test_a_mapped_convolution_is_the_plain_one():
    assert mapped(TPU, C=128) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_over_a_mesh_it_is_the_plain_one(mesh):
    """Rows, channels and tokens cut, also into pieces with fewer than are read before a token."""
    assert meshed(mesh, TPU, C=256) < 1e-5


@pytest.mark.slow
def test_over_explicit_axes_it_is_the_plain_one():
    assert over_explicit_axes(TPU, C=128) < 1e-5


@pytest.mark.slow
def test_a_layer_is_the_plain_one():
    """Packed, padded, from a state; which of op and convolution takes lengths only rounds."""
    assert layer(TPU, head_dim=64) < 3e-5  # the bar of gradients, which are among the results


def test_what_cannot_run_says_so():
    case = WIDE(Form(silu, 128), T=3)
    u, before, taps, *_ = case.arrays()
    call = lambda u: dispatch.short_convolution(
        selection.by_name(TPU), case.form, u, before, taps, None, None
    )
    with pytest.raises(TypeError, match='name conv_implementation="plain" for second derivatives'):
        jax.jit(jax.grad(lambda u: jnp.sum(jax.grad(lambda u: jnp.sum(call(u) ** 2))(u)))).trace(u)
    with pytest.raises(ValueError, match="'pallas_tpu' runs on tpu, cpu only; 'plain' runs any"):
        jax.jit(call).trace(u).lower(lowering_platforms=("cuda",))
    with pytest.raises(ValueError, match="JAX does not know for which TPU; this program is low"):
        jax.jit(call).trace(u).lower(lowering_platforms=("tpu",))
    narrow = made(TPU, jnp.float32, head_dim=8)
    with pytest.raises(ValueError, match="there are 16 channels; it takes multiples of 128, at"):
        narrow(jnp.zeros((1, 3, 16)))


@pytest.mark.parametrize(
    ("form", "changes", "reason"),
    [
        (Form(silu, 128), {}, None),
        (Form(jax.nn.relu), {}, "the activation is relu; it takes silu and none"),
        (Form(silu), {"conv_size": 9}, "conv_size is 9; it takes 2 to 8"),
        (Form(silu), {"C": 192}, "there are 192 channels; it takes multiples of 128, at most"),
        (Form(silu, 192), {"C": 384}, "the width of a head is 192; it takes divisors of 128"),
        (
            Form(silu, 1024),
            {"C": 1024},
            "is 1024; it takes divisors of 128 and its multiples up to",
        ),
        (Form(silu), {"dtype": jnp.float16}, "the dtype is float16; it takes bfloat16 and fl"),
    ],
)
def test_what_the_kernels_take_can_be_asked(form, changes, reason):
    sizes = {"C": 256, "conv_size": 4, "dtype": jnp.bfloat16} | changes
    found = convolution_passes.unsupported(form, **sizes)
    assert found is reason is None or reason in found
