"""The op inside JAX's transformations, and what it promises about dtypes, memory and lowering."""

import doctest
import functools
import re

import jax
import jax.monitoring
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import Case, cast, relative_error
from quick import quick

from deltaproduct_jax.ops import (
    RESIDUAL_NAMES,
    api,
    delta_product,
    delta_product_step,
)

P = jax.sharding.PartitionSpec
CASE = Case(T=10, R=2, B=4, H=2, G=2, K=4, V=3)
chunked = functools.partial(delta_product, implementation="chunked", chunk_size=4)
recurrent = functools.partial(delta_product, implementation="recurrent")


def inputs(case=CASE):
    arrays = cast(case.arrays(), "float32")
    return {name: jnp.asarray(x) for name, x in arrays.items() if x is not None}


def loss(arrays, op=chunked, **options):
    o, final = op(**arrays, **options)
    return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final))


def assert_trees_close(x, y, tolerance=1e-5):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert relative_error(a, b) <= tolerance


def test_eager_equals_jit():
    arrays = inputs()
    assert_trees_close(chunked(**arrays), jax.jit(lambda a: chunked(**a))(arrays))


def test_vmap_of_value_and_gradient():
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), inputs())
    ids = jnp.asarray(Case(T=10, B=4, segments=True).segment_ids())
    fn = jax.value_and_grad(functools.partial(loss, segment_ids=ids))
    mapped = jax.jit(jax.vmap(fn))(stacked)
    fn = jax.jit(fn)
    one_by_one = [fn(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(2)]
    assert_trees_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one))


@pytest.mark.slow
def test_vmap_over_segment_ids():
    ids = jnp.stack([jnp.zeros((4, 10), int), jnp.arange(40).reshape(4, 10) // 3])
    of_ids = lambda i: loss(inputs(), segment_ids=i)
    assert_trees_close(jax.vmap(of_ids)(ids), jax.lax.map(of_ids, ids))


def test_gradient_with_respect_to_segment_ids_is_empty():
    ids = jnp.zeros((4, 10), jnp.int32)
    _, pullback = jax.vjp(lambda i: chunked(**inputs(), segment_ids=i)[0], ids)
    (cotangent,) = pullback(jnp.ones((4, 10, 4, 3)))
    assert cotangent.dtype == jax.dtypes.float0


@pytest.mark.slow
def test_inside_scan_over_layers():
    arrays = inputs()
    v_scales = jnp.array([1.0, 0.5, 2.0])

    def layer(x, scale):
        return x + chunked(**{**arrays, "v": scale * x[:, :, None] + arrays["v"]})[0], None

    def scanned(scales):
        return jnp.sum(jax.lax.scan(layer, jnp.zeros((4, 10, 4, 3)), scales)[0] ** 2)

    def unrolled(scales):
        x = jnp.zeros((4, 10, 4, 3))
        for scale in scales:
            x, _ = layer(x, scale)
        return jnp.sum(x**2)

    assert_trees_close(jax.jit(jax.grad(scanned))(v_scales), jax.jit(jax.grad(unrolled))(v_scales))


def choices_of_gradient(policy):
    """Every pass over the sequence, forward, again, or backward, is a choice by platform.

    What is made of operands before and behind has others, whatever is kept.
    """
    checkpointed = jax.checkpoint(loss, policy=policy)
    return str(jax.make_jaxpr(jax.grad(checkpointed))(inputs())).count("platform_index[")


def test_remat():
    arrays = inputs()
    expected = jax.jit(jax.grad(loss))(arrays)
    assert_trees_close(jax.jit(jax.grad(jax.checkpoint(loss)))(arrays), expected)


@pytest.mark.slow
def test_named_residuals_spare_the_second_scan_under_remat():
    policies = jax.checkpoint_policies
    with_the_second = choices_of_gradient(policies.nothing_saveable)
    unnamed = policies.save_any_names_but_these(*RESIDUAL_NAMES)
    assert choices_of_gradient(unnamed) == with_the_second
    assert choices_of_gradient(policies.save_any_names_but_these()) == with_the_second - 1
    some = policies.save_only_these_names(*RESIDUAL_NAMES[1:])
    assert choices_of_gradient(some) == with_the_second - 1


@pytest.mark.parametrize("implementation", ["recurrent", "associative"])
def test_forward_mode(implementation):
    """<cotangent, J tangent> from jvp equals that from vjp of the chunked form."""
    arrays = inputs()
    tangents = jax.tree.map(lambda x: jnp.cos(3 * x), arrays)
    op = functools.partial(delta_product, implementation=implementation)
    outputs, pushed = jax.jvp(lambda a: op(**a), (arrays,), (tangents,))
    cotangents = jax.tree.map(jnp.sin, outputs)
    _, pullback = jax.vjp(lambda a: chunked(**a), arrays)
    pulled = pullback(cotangents)[0]

    def inner(x, y):
        return sum(float(jnp.vdot(x[n], y[n])) for n in x)

    forward = sum(float(jnp.vdot(c, p)) for c, p in zip(cotangents, pushed, strict=True))
    np.testing.assert_allclose(forward, inner(pulled, tangents), rtol=1e-4)


def test_a_gradient_of_a_tangent_is_refused_by_name():
    """Its tangents are constants, so that JAX meets the op's own rule for gradients first."""
    arrays = inputs()
    slope = lambda arrays: jax.jvp(loss, (arrays,), (inputs(),))[1]
    for gradient in (jax.grad(slope), jax.jit(jax.grad(slope))):
        with pytest.raises(TypeError, match='name implementation="recurrent" or "associative"'):
            gradient(arrays)


@pytest.mark.slow
def test_second_derivatives_over_reverse_mode():
    """Hessian-vector products work in both modes: the backward pass itself is plain JAX."""
    arrays = inputs()
    direction = jax.tree.map(jnp.cos, arrays)

    def product(op):
        gradient = jax.grad(functools.partial(loss, op=op))
        return jax.jit(lambda a: jax.jvp(gradient, (a,), (direction,))[1])(arrays)

    @jax.jit
    @jax.grad
    def reverse_over_reverse(arrays):
        pairs = zip(jax.grad(loss)(arrays).values(), direction.values(), strict=True)
        return sum(jnp.vdot(x, y) for x, y in pairs)

    expected = product(recurrent)
    assert_trees_close(product(chunked), expected, 1e-4)
    assert_trees_close(reverse_over_reverse(arrays), expected, 1e-4)


def test_shard_map_over_batch_and_heads():
    arrays = inputs()
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {
        "q": P("data", None, "tensor"),
        "k": P("data", None, None, "tensor"),
        "v": P("data", None, None, "tensor"),
        "beta": P("data", None, None, "tensor"),
        "g": P("data", None, "tensor"),
        "initial_state": P("data", "tensor"),
    }
    gradient = jax.grad(loss)
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(specs,), out_specs=specs)
    assert_trees_close(jax.jit(sharded)(arrays), jax.jit(gradient)(arrays))
    # Not differentiated, None chooses by platform inside the custom_vjp.
    outputs = specs["g"], specs["initial_state"]
    sharded = jax.shard_map(
        lambda a: delta_product(**a), mesh=mesh, in_specs=(specs,), out_specs=outputs
    )
    assert_trees_close(jax.jit(sharded)(arrays), delta_product(**arrays))


@pytest.mark.slow
def test_shard_map_with_replicated_arguments():
    """A learnt initial state is the same on every device; its gradient is summed over them."""
    arrays = inputs()
    state = arrays.pop("initial_state")[:2]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradient(arrays, state):
        return jax.grad(lambda s: jnp.sum(chunked(**arrays, initial_state=s)[0]))(state)

    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 2], arrays) for i in (0, 2)]
    expected = sum(gradient(half, state) for half in halves)
    assert_trees_close(jax.jit(sharded)(arrays, state), expected)


def test_the_second_call_does_not_compile():
    compiled = []
    arrays = inputs(Case(T=11, R=1, B=1, K=3, V=2))
    gradient = jax.jit(jax.grad(loss))

    def call():
        jax.block_until_ready((delta_product(**arrays), gradient(arrays)))

    def listen(event, duration, **kwargs):
        del duration, kwargs
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    call()
    first = len(compiled)
    call()
    assert first > 0
    assert len(compiled) == first


@pytest.mark.parametrize("implementation", ["recurrent", "associative", "chunked"])
def test_no_token(implementation):
    arrays = inputs(Case(T=0))
    o, final = delta_product(**arrays, implementation=implementation)
    assert o.shape == (2, 0, 2, 8)
    np.testing.assert_array_equal(final, arrays["initial_state"])


def test_one_token_equals_a_step():
    arrays = inputs(Case(T=1, R=3, G=2, l2norm=True))
    o, final = delta_product(**arrays, scale=0.3, use_qk_l2norm=True)
    state = arrays.pop("initial_state")
    one = {name: x[:, 0] for name, x in arrays.items()}
    o_step, state = delta_product_step(state, **one, scale=0.3, use_qk_l2norm=True)
    assert_trees_close((o[:, 0], final), (o_step, state), 1e-6)


def test_l2norm_of_small_and_of_zero_vectors():
    """1e-6 stands inside the root: vectors of length 1e-3 come out at 1 / sqrt(2)."""
    arrays = cast(Case(T=3, H=1).arrays(), "float32")
    arrays["k"] *= np.float32(1e-3)
    arrays["q"][:, 0] = 0
    cotangents = np.ones((2, 3, 1, 8), np.float32), np.ones((2, 1, 8, 8), np.float32)
    *expected, expected_gradients = oracle.delta_product(
        **arrays, use_qk_l2norm=True, cotangents=cotangents
    )
    outputs, pullback = jax.vjp(lambda a: delta_product(**a, use_qk_l2norm=True), arrays)
    assert_trees_close(outputs, tuple(expected))
    assert_trees_close(pullback(tuple(map(jnp.asarray, cotangents)))[0], expected_gradients, 1e-4)


@pytest.mark.parametrize(
    ("implementation", "wide_gates"),
    [("recurrent", True), ("associative", True), ("chunked", False), ("chunked", True)],
)
def test_dtypes(implementation, wide_gates):
    """Outputs have the dtype of v, states are float32, gradients have the dtypes of the inputs."""
    arrays = cast(CASE.arrays(), "bfloat16")
    if wide_gates:
        arrays = {n: x.astype(np.float32) if n in ("g", "beta") else x for n, x in arrays.items()}
    outputs, pullback = jax.vjp(lambda a: delta_product(**a, implementation=implementation), arrays)
    assert [x.dtype for x in outputs] == [ml_dtypes.bfloat16, np.float32]
    gradients = pullback(outputs)[0]
    assert {n: x.dtype for n, x in gradients.items()} == {n: x.dtype for n, x in arrays.items()}


def test_numpy_arrays_and_defaults():
    arrays = cast(Case(T=5, gate=None, state=False).arrays(), "float32")
    expected = oracle.delta_product(**arrays)
    for x, y in zip(delta_product(**arrays), expected, strict=True):
        assert isinstance(x, jax.Array)
        assert relative_error(x, y) < 1e-5


@pytest.mark.slow
def test_memory_of_a_gradient_is_small_and_no_system_is_solved():
    """Kept: the inputs and one state per chunk; a scan over tokens holds 540 MiB here.

    Every platform's program stands in the traced one; test_tpu_compile.py reads a TPU's compiled.
    """
    case = Case(T=2048, R=2, B=1, H=4, K=64, V=64, state=False)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.float32),
        {n: x for n, x in case.arrays().items() if x is not None},
    )
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(delta_product(**a)[0])))
    traced = gradient.trace(shapes)
    assert "triangular_solve" not in str(traced.jaxpr)
    compiled = traced.lower().compile()
    assert "trsm" not in compiled.as_text()  # LAPACK's, which solves on a CPU
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 2**20


@pytest.mark.parametrize(
    ("dtype", "precision", "highest", "high", "bfloat16"),
    [
        ("float32", None, "all", "none", "none"),
        ("float32", "highest", "all", "none", "none"),
        ("float32", "default", "gate sums", "none", "none"),
        ("bfloat16", None, "none", "inverse and gate sums", "the rest"),
        ("bfloat16", "default", "gate sums", "none", "the rest"),
        ("bfloat16", "highest", "all", "none", "none"),
    ],
)
def test_precision_of_the_products_as_lowered_for_tpu(dtype, precision, highest, high, bfloat16):
    """On a CPU every float32 product is exact, so the program is read instead of run."""
    arrays = cast(Case(T=16, R=1).arrays(), dtype)

    def total(arrays):
        outputs = delta_product(**arrays, chunk_size=16, precision=precision)
        return sum(jnp.sum(x.astype(np.float32)) for x in outputs)

    gradient = jax.jit(jax.grad(total))
    text = gradient.trace(arrays).lower(lowering_platforms=("tpu",)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    # Five kinds of decay: without scores, as nobody asks for outputs here; on the way back; their
    # cotangents. Two passes of 2 * (log2(16) - 1)
    # products for the inverse.
    gates, inverse = 4 + 5 + 5, 2 * 2 * 3
    counts = {
        "none": 0,
        "gate sums": gates,
        "inverse and gate sums": inverse + gates,
        "the rest": len(dots) - inverse - gates,
        "all": len(dots),
    }
    assert len(dots) > inverse + gates
    for marker, expected in ((r"\bHIGHEST\b", highest), (r"\bHIGH\b", high), ("bf16", bfloat16)):
        assert sum(re.search(marker, line) is not None for line in dots) == counts[expected], marker


@pytest.mark.parametrize("implementation", quick(["chunked", "recurrent"], ["chunked"]))
def test_no_product_is_by_a_default_of_jax(implementation):
    with jax.default_matmul_precision("BF16_BF16_F32"):  # which a CPU refuses
        of = functools.partial(loss, op=delta_product, implementation=implementation)
        text = str(jax.make_jaxpr(jax.grad(of))(inputs()))
    assert "dot_general" in text
    assert "BF16_BF16_F32" not in text


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(api).attempted > 0
    assert doctest.testmod(api).failed == 0


@pytest.mark.parametrize("implementation", ["chunked", "recurrent"])
def test_loops_on_a_cpu_carry_no_bfloat16(implementation):
    """A CPU would convert the arrays as a whole in every step, in a time quadratic in T."""
    arrays = cast(Case(T=64).arrays(), "bfloat16")
    gradient = jax.jit(
        jax.grad(lambda a: jnp.sum(delta_product(**a, implementation=implementation)[1]))
    )
    text = gradient.lower(arrays).as_text()
    loops = [line for line in text.splitlines() if "stablehlo.while" in line]
    assert loops
    assert not [line for line in loops if "bf16" in line]
