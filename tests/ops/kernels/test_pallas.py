"""The TPU kernel as a CPU interprets it: composition, planning, its own products and its errors.

Its accuracy is a row of the matrix in test_accuracy.py, and test_tpu_compile.py has the
compiler for the chips.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Case, cast, errors, plain_bfloat16_error, relative_error
from quick import quick

from deltaproduct_jax.ops import delta_product, select_implementation, sharded_delta_product
from deltaproduct_jax.ops.kernels.pallas import passes
from deltaproduct_jax.ops.kernels.pallas import plan as pallas_plan
from deltaproduct_jax.ops.kernels.pallas.products import Passes, unit_lower_inverse

CASE = Case(T=12, R=2, B=1, H=1, G=2, K=8, V=4, segments=True)
LONG = Case(T=128, R=4, B=1, H=1, G=1, K=8, V=4, segments=True)
LONG_AND_PLAIN = dataclasses.replace(LONG, gate=None, segments=False)
EXACT = Passes.of(jnp.dtype("float32"), None, interpret=True)
NARROW = Passes.of(jnp.dtype("bfloat16"), None, interpret=True)


def inputs(case=CASE):
    arrays = {n: jnp.asarray(x) for n, x in cast(case.arrays(), "float32").items() if x is not None}
    return arrays, case.segment_ids()


def loss(arrays, ids, implementation, op=delta_product):
    o, final = op(**arrays, segment_ids=ids, implementation=implementation)
    return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final))


def assert_close(x, y, tolerance=1e-5):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert relative_error(a, b) <= tolerance


@pytest.mark.slow
def test_vmap_remat_and_jit():
    arrays, ids = inputs()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arrays)

    def gradient(implementation):
        checkpointed = jax.checkpoint(functools.partial(loss, implementation=implementation))
        return jax.jit(jax.vmap(jax.value_and_grad(checkpointed), in_axes=(0, None)))(stacked, ids)

    assert_close(gradient("pallas_tpu"), gradient("chunked"))


@pytest.mark.parametrize("second", [jax.jacfwd, jax.jacrev])
def test_a_second_derivative_names_the_remedy(second):
    arrays, ids = inputs()
    gradient = jax.jit(jax.grad(lambda v: loss({**arrays, "v": v}, ids, "pallas_tpu")))
    with pytest.raises(TypeError, match='name implementation="chunked" for second derivatives'):
        second(gradient)(arrays["v"])


@pytest.mark.slow
def test_over_a_mesh_with_the_sequence_axis():
    arrays, ids = inputs(Case(T=32, R=2, B=2, H=2, K=8, V=4, segments=True))
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=axes)
    op = functools.partial(
        sharded_delta_product,
        mesh=mesh,
        batch_axis="data",
        head_axis="tensor",
        sequence_axis="sequence",
    )
    gradient = jax.jit(jax.value_and_grad(functools.partial(loss, op=op)), static_argnums=2)
    expected = jax.jit(jax.value_and_grad(loss), static_argnums=2)(arrays, ids, "chunked")
    assert_close(gradient(arrays, ids, "pallas_tpu"), expected)


@pytest.mark.slow
def test_heads_in_groups_and_inputs_that_are_not_fetched_ahead(monkeypatch):
    """As on a chip with little memory: one head after the other."""
    case = Case(T=17, R=2, B=1, H=2, G=2, K=8, V=8)
    arrays, _ = inputs(case)
    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    expected = gradient(arrays, None, "chunked")
    sizes = {"spans": 1, "T": 17, "R": 2, "H": 2, "Hv": 4, "K": 8, "V": 8}
    plan = functools.partial(pallas_plan.plan_of, jnp.dtype("float32"), **sizes)
    assert (plan().together, plan().buffers) == (2, 2)
    least = pallas_plan.MOST_MEMORY
    assert plan().keeps
    while plan().together > 1 or plan().buffers > 1 or plan().keeps:
        least = int(0.99 * least)
        monkeypatch.setattr(pallas_plan, "MOST_MEMORY", least)
        assert plan().bytes <= least
    assert_close(gradient(arrays, None, "pallas_tpu"), expected)


@pytest.mark.parametrize(
    "case", quick([LONG, LONG_AND_PLAIN], [LONG]), ids=["gates and segments", "neither"]
)
@pytest.mark.slow
def test_a_state_every_second_span(case):
    """Nothing but these is kept: an array that a kernel does not fill holds NaN if interpreted."""
    arrays, ids = inputs(case)
    sizes = {"spans": 4, "T": case.T, "R": 4, "H": 1, "Hv": case.G, "K": 8, "V": 4}
    plan = pallas_plan.plan_of(jnp.dtype("float32"), **sizes)
    assert (plan.spans, plan.span // plan.chunk, plan.joined) == (2, 4, 2)
    with jax.debug_nans(True):
        _, pullback = jax.vjp(functools.partial(loss, ids=ids, implementation="pallas_tpu"), arrays)
    (states,) = (x for x in jax.tree.leaves(pullback) if x.ndim == 6)
    assert states.shape[0] == 2
    assert np.isfinite(states).all()
    expected = jax.jit(jax.grad(loss), static_argnums=2)(arrays, ids, "chunked")
    assert_close(pullback(jnp.float32(1)), (expected,))


@pytest.mark.slow
def test_other_platforms_keep_as_many_states_as_the_kernel(monkeypatch):
    """As on a TPU, where None may run the kernel, and a program may still be lowered for a CPU."""
    case = Case(T=200, R=2, B=1, H=1, K=64, V=64)
    arrays, _ = inputs(case)
    expected = jax.jit(jax.value_and_grad(loss), static_argnums=2)(arrays, None, "chunked")
    monkeypatch.setattr(passes, "is_ready", lambda: True)
    jax.clear_caches()
    got, pullback = jax.vjp(functools.partial(loss, ids=None, implementation=None), arrays)
    (states,) = (x for x in jax.tree.leaves(pullback) if x.ndim == 6)
    assert states.shape[0] == 2
    assert_close((got, *pullback(jnp.float32(1))), expected)
    jax.clear_caches()


@pytest.mark.parametrize(("spans", "expected"), [(1, 1), (2, 1), (3, 3), (6, 3), (65, 65)])
def test_spans_are_paired_where_their_number_is_even(spans, expected):
    sizes = {"T": 64 * spans, "R": 2, "H": 8, "Hv": 8, "K": 128, "V": 128}
    plan = pallas_plan.plan_of(jnp.dtype("bfloat16"), spans=spans, **sizes)
    assert plan.spans == expected
    assert (plan.chunk, plan.together, plan.buffers) == (64, 8, 2)


# Of a core, in MiB: v4; v5p and TPU7x; v5e and v6e.
@pytest.mark.parametrize("memory", [16, 64, 128])
def test_vector_memory_is_that_of_the_chip(memory, monkeypatch):
    monkeypatch.setattr(pallas_plan, "memory_of_core", lambda: memory * 2**20)
    dtypes, widths = [jnp.dtype("bfloat16"), jnp.dtype("float32")], (64, 128, 192, 256)
    for dtype, R, K, V in itertools.product(dtypes, (1, 2, 3, 4), widths, widths):
        sizes = {"T": 4096, "R": R, "H": 8, "Hv": 8, "K": K, "V": V}
        plan = pallas_plan.plan_of(dtype, spans=32 * R, **sizes)
        allowed = pallas_plan.vector_memory(plan)
        assert plan.limit <= allowed <= memory * 2**20
        fits = passes.unsupported(dtype=dtype, B=1, precision=None, **sizes) is None
        assert fits == (plan.bytes <= plan.limit)
        assert fits or memory == 16
    # What 48 MiB are too few for, the whole of a large chip holds.
    sizes = {"T": 4096, "R": 2, "H": 8, "Hv": 16, "K": 256, "V": 256}
    plan = pallas_plan.plan_of(dtypes[1], spans=64, **sizes)
    assert (plan.bytes <= plan.limit) == (memory == 128)
    assert (pallas_plan.vector_memory(plan) > pallas_plan.MOST_MEMORY) == (memory > 16)


@pytest.mark.usefixtures("unchecked")
def test_what_a_chip_has_no_memory_for_is_an_error(monkeypatch):
    monkeypatch.setattr(pallas_plan, "memory_of_core", lambda: 16 * 2**20)
    arrays = cast(Case(T=128, R=1, B=1, H=8, K=128, V=128).arrays(), "float32")
    text = "in float32 need 14.1 MiB of vector memory, and there are 14.0 MiB; 'chunked' can"
    with pytest.raises(ValueError, match=re.escape(text)):
        delta_product(**arrays, implementation="pallas_tpu")
    monkeypatch.setattr(passes, "is_ready", lambda: True)
    sizes = {"B": 1, "T": 128, "R": 1, "Hv": 8, "K": 128, "V": 128, "differentiated": True}
    assert select_implementation("tpu", **sizes) == "chunked"
    assert select_implementation("tpu", **sizes, dtype="bfloat16") == "pallas_tpu"


@pytest.mark.parametrize("M", [16, 48, 128])
def test_inverse_of_reflections_by_one_key(M):
    """beta = 2 and identical keys: the powers of the strict part reach 1e27 at M = 64."""
    lower = np.tril(np.full((M, M), 2.0), -1)[None]
    inverse = jax.jit(unit_lower_inverse, static_argnums=1)
    got = inverse(jnp.asarray(lower, jnp.float32), EXACT)
    assert relative_error(got, np.linalg.inv(np.eye(M) + lower)) < 1e-6
    rng = np.random.default_rng(0)
    lower = np.tril(rng.normal(size=(2, M, M)) / np.sqrt(M), -1)
    got = inverse(jnp.asarray(lower, jnp.float32), NARROW)
    assert relative_error(got, np.linalg.inv(np.eye(M) + lower)) < 1e-4


@pytest.mark.parametrize(("keys", "gate"), [("identical", "slow"), ("parallel", None)])
@pytest.mark.slow
def test_reflections_in_bfloat16_err_like_plain_products(keys, gate):
    """Rounded to one term, the inverse makes errors of three to twenty times these."""
    case = Case(T=192, B=1, H=1, K=32, V=32, beta=(2.0, 2.0), keys=keys, gate=gate, seed=1)
    of_outputs, of_gradients = errors(case, "pallas_tpu", "bfloat16")
    plain = plain_bfloat16_error(case)
    assert max(of_outputs.values()) <= 2 * plain
    assert max(of_gradients.values()) <= 3 * plain


def test_passes():
    x, y = np.random.default_rng(0).normal(size=(2, 1, 64, 64)).astype(np.float32)
    ones = np.tri(64, dtype=np.float32)
    exact, sums = (x.astype(np.float64) @ other for other in (y, ones))
    x, y, ones = map(jnp.asarray, (x, y, ones))
    products = {
        "six": (EXACT("hmk,hkn->hmn", x, y), exact, 0, 1e-6),
        "three": (NARROW.within_inverse("hmk,hkn->hmn", x, y), exact, 1e-7, 2e-5),
        "one": (NARROW("hmk,hkn->hmn", x, y), exact, 1e-3, 4e-3),
        "gates": (NARROW.over_gates("hmk,kn->hmn", x, ones), sums, 0, 2e-6),
    }
    for name, (got, want, least, most) in products.items():
        assert least <= relative_error(got, want) <= most, name


def test_it_is_chosen_on_a_tpu_where_it_can_run(monkeypatch):
    monkeypatch.setattr(passes, "is_ready", lambda: True)
    sizes = {"B": 1, "T": 64, "R": 2, "Hv": 4, "K": 64, "V": 64, "dtype": jnp.bfloat16}

    def choice(platform="tpu", differentiated=True, **changes):
        return select_implementation(platform, **sizes | changes, differentiated=differentiated)

    assert choice() == choice(differentiated=False) == "pallas_tpu"
    assert choice(dtype=jnp.float32, K=128, V=256, R=4) == "pallas_tpu"
    assert choice("cuda") == choice("cpu") == "chunked"
    assert choice(K=32) == choice(chunk_size=16) == choice(R=9) == "chunked"
    assert choice(dtype=jnp.float64) == "chunked"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("case", "dtype", "options", "text"),
    [
        (
            Case(T=3),
            "float64",
            {},
            "q is float64, and it takes bfloat16 and float32; 'chunked'",
        ),
        (Case(T=3, R=9), "float32", {}, "cannot run this: R=9 must be at most 8"),
        (Case(T=3, K=300), "float32", {}, "K=300 must be at most 256 and V=8 at most 512"),
        (Case(T=3, H=300, V=256), "float32", {}, "MiB of vector memory, and there are 48.0 MiB"),
        (Case(T=3), "float32", {"chunk_size": 2}, "chunk_size=2 has no meaning for"),
    ],
)
def test_errors(case, dtype, options, text):
    with jax.enable_x64(dtype == "float64"), pytest.raises(ValueError, match=re.escape(text)):
        delta_product(**cast(case.arrays(), dtype), implementation="pallas_tpu", **options)


@pytest.mark.parametrize(
    ("memory", "devices", "says"),
    [
        (None, 1, "JAX does not know for which TPU"),
        (2**27, 2, "2 devices are left to the compiler, which cuts no kernel; sharded_delta_pro"),
    ],
)
def test_why_it_cannot_be_lowered_is_said_when_it_is(memory, devices, says, monkeypatch):
    monkeypatch.setattr(passes, "memory_of_core", lambda: memory)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    arrays, _ = inputs(dataclasses.replace(CASE, B=2, T=2, segments=False))
    arrays = jax.device_put(arrays, jax.sharding.NamedSharding(mesh, spec))
    run = jax.jit(functools.partial(loss, ids=None, implementation="pallas_tpu"))
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        jax.export.export(run, platforms=["tpu"])(arrays)
    text = str(caught.value)
    assert text.startswith("implementation='pallas_tpu' cannot run this; 'chunked' can: ")
    assert text.endswith("; this program is lowered for tpu")
    assert "\n" not in text


def test_a_gpu_is_told_when_lowered():
    arrays, ids = inputs()
    lowered = jax.jit(functools.partial(loss, implementation="pallas_tpu")).trace(arrays, ids)
    with pytest.raises(Exception, match="cuda"):
        lowered.lower(lowering_platforms=("cuda",))
