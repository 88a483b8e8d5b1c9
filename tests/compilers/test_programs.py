"""What is read of compiled programs: what they send and take, and how children compile them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.compilers import child, hlo_cost, topologies, tpu
from deltaproduct_jax.compilers.collectives import (
    collectives,
    collectives_by_axis,
    collectives_in_a_run,
)
from deltaproduct_jax.compilers.memory import memory_of
from deltaproduct_jax.compilers.products import product_operations
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.ops.kernels.containment import SCOPE

AUTO = jax.sharding.AxisType.Auto
SENT = """
  %sum = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  %moved = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%c), channel_id=2
  %done = f32[8,4]{1,0} collective-permute-done(%moved)
  %flags = pred[16]{0} all-gather(%d), channel_id=3
  %parts = (f32[7]{0}, f32[7]{0}) all-to-all(%e, %f), channel_id=4
  %ahead = ((f32[9]{0}, f32[9]{0}), (f32[9]{0}, f32[9]{0})) all-to-all-start(%g, %h), channel_id=5
  %alone = f32[512]{0} add(%e, %e)
"""


def test_sums_are_taken_apart_permutes_counted_once_and_parts_together():
    assert collectives(SENT) == [
        ("all-gather", 16),
        ("all-reduce", 2 * 4),
        ("all-reduce", 4 * 2 * 3),
        ("all-to-all", 4 * 2 * 7),
        ("all-to-all", 4 * 2 * 9),
        ("collective-permute", 4 * 8 * 4),
    ]


GROUPS = """
  %a = f32[2]{0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %b = f32[4]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %c = f32[8]{0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %d = f32[3]{0} collective-permute(%x), source_target_pairs={{0,2},{1,3},{4,6},{5,7}}
  %e = f32[5]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  %f = f32[6]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}
  %g = f32[7]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, dimensions={0}
  %h = f32[9]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, dimensions={0}
"""


def test_the_axes_along_which_a_program_sends():
    found = collectives_by_axis(GROUPS, {"x": 2, "y": 2, "z": 2})
    assert [(sent.size // 4, sent.axes) for sent in sorted(found, key=lambda s: s.size)] == [
        (2, ("z",)),
        (3, ("y",)),
        (4, ("y", "z")),
        (5, ("x", "y", "z")),
        (6, ("z",)),
        (7, ("z",)),
        (8, ("x",)),
        (9, ("x", "y")),
    ]
    with pytest.raises(ValueError, match="not understood: %a = f32"):
        collectives_by_axis(GROUPS.replace("groups={{0,1}", "groups=odd{{0,1}"), {"x": 8})


# As libtpu writes a gather that it goes on with behind other work; 4 is another of the same size.
CHAINED = """
%first (x: f32[2]) -> f32[4] {
  %a = f32[4]{0} all-gather(%x), channel_id=1, frontend_attributes={chain_id="3"}
}
%second (x: f32[2]) -> f32[4] {
  %b = f32[4]{0} all-gather(%x), channel_id=1, frontend_attributes={chain_id="3"}
}
%third (x: f32[2]) -> f32[4] {
  %c = f32[4]{0} all-gather(%x), channel_id=1, frontend_attributes={chain_id="4"}
}
"""


def test_a_collective_that_several_fusions_go_on_with_counts_once():
    assert collectives(CHAINED) == 2 * [("all-gather", 16)]
    counts = collectives_in_a_run(CHAINED, {}, {"first": 3, "second": 3, "third": 3})
    assert counts == {("all-gather", 16, ()): 6}


def test_collectives_of_a_real_program():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=split)
    text = jax.jit(lambda x: x.sum(0)).lower(x).compile().as_text()
    assert collectives(text) == [("all-reduce", 6 * 4)]
    assert collectives_by_axis(text, mesh.shape) == [("all-reduce", 6 * 4, ("x",))]


def test_memory_is_that_of_the_arrays():
    compiled = jax.jit(lambda x: (x @ x, x[0])).lower(jnp.zeros((8, 8))).compile()
    found = memory_of(compiled)
    assert found["argument_bytes"] == 4 * 64
    assert found["output_bytes"] >= 4 * (64 + 8)  # and the table of a tuple
    silent = type("Silent", (), {"memory_analysis": lambda self: None})()
    assert memory_of(silent) == dict.fromkeys(found)


def test_a_child_answers_entry_by_entry():
    found = child.call_apart(
        "operator:neg",
        [1, 4],
        folder=Path(__file__).parents[2],
        environment=tpu.child_environment(Path("extra")),
        timeout_s=60,
    )
    assert found == ([-1, -4], None)


def test_the_environment_of_a_child(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--a=1")
    monkeypatch.setenv("PYTHONPATH", "here")
    found = tpu.child_environment(Path("extra"), "profile")
    assert found["LIBTPU_INIT_ARGS"] == "--a=1 --xla_jf_dump_static_llo_profile_to=profile"
    assert found["PYTHONPATH"].split(":") == ["here", "extra"]
    code = tpu.child_environment(Path("extra"), code_folder="code")["LIBTPU_INIT_ARGS"]
    assert code.startswith("--a=1 --xla_jf_dump_to=code ")
    assert (found["JAX_PLATFORMS"], found["XLA_FLAGS"]) == ("cpu", "")
    assert tpu.child_environment(Path("extra"))["LIBTPU_INIT_ARGS"] == "--a=1"


def test_clocks_follow_from_published_peaks():
    peaks = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
    products = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    for name, generation in tpu.GENERATIONS.items():
        np.testing.assert_allclose(2 * products[name] * generation.hertz, peaks[name], rtol=0.01)


def test_what_a_loop_sends_counts_as_often_as_it_runs():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AUTO,), devices=jax.devices()[:2])
    cut = jax.sharding.PartitionSpec("x")

    def inside(x):
        once = jax.lax.psum(x, "x")
        step = lambda carry, _: (jax.lax.ppermute(carry, "x", [(0, 1), (1, 0)]), None)
        return jax.lax.scan(step, jax.lax.pcast(once, "x", to="varying"), length=5)[0]

    run = jax.shard_map(inside, mesh=mesh, in_specs=cut, out_specs=cut)
    text = jax.jit(run).lower(jnp.ones(6)).compile().as_text()
    found = collectives_in_a_run(text, mesh.shape, hlo_cost.passes(text))
    assert found == {
        ("all-reduce", 4 * 3, ("x",)): 1,
        ("collective-permute", 4 * 3, ("x",)): 5,
    }


@pytest.mark.parametrize("scope", [SCOPE, "another"])
def test_loops_over_rows_that_are_not_finite_have_no_turns(scope):
    def run(x):
        with jax.named_scope(scope):
            halved = lambda x: jnp.sin(x / 2)
            return jax.lax.while_loop(lambda x: jnp.max(x) > 1, halved, x)

    text = jax.jit(run).lower(jnp.ones(6)).compile().as_text()
    if scope != SCOPE:
        with pytest.raises(ValueError, match="the trip count of a loop is not to be seen"):
            hlo_cost.passes(text)
        return
    assert list(hlo_cost.cost(text).loops.values()) == [0]
    counts = hlo_cost.passes(text).values()
    assert set(counts) == {0, 1}  # a body, and the rest


def test_operations_of_products():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    one = 2 * 3 * 4 * 4
    count = lambda f, *args, platform="cpu": product_operations(
        jax.make_jaxpr(f)(*args).jaxpr, platform
    )
    assert count(lambda x, w: jnp.tanh(x @ w), x, w) == one
    assert count(lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, length=5)[0], x, w) == (
        5 * one
    )
    # Backwards the product is computed anew, then once for each operand.
    square = lambda x, w: jnp.sum(jnp.sin(x @ w) @ w)
    assert count(jax.grad(jax.checkpoint(square), argnums=(0, 1)), x, w) == 7 * one
    either = lambda x, w: jax.lax.platform_dependent(
        x, w, tpu=lambda x, w: x @ w @ w @ w, default=lambda x, w: x @ w
    )
    assert [count(either, x, w, platform=p) for p in ("tpu", "cpu")] == [3 * one, one]
    assert count(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x), x, w) == (
        2 * one
    )
    kernel = jnp.ones((2, 4, 1))
    convolve = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    assert count(convolve, jnp.ones((1, 8, 4)), kernel) == 2 * 8 * 2 * 4


def test_operations_of_all_devices():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AUTO,), devices=jax.devices()[:2])
    cut = jax.sharding.PartitionSpec("x")
    run = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=cut, out_specs=cut)
    assert product_operations(jax.make_jaxpr(run)(jnp.ones((4, 3))).jaxpr, "cpu") == 2 * 24


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2x", "h100:0"])
def test_topologies_that_are_not_known(name):
    with pytest.raises(ConfigError, match=rf"^topology='{name}' is not known; it may be chips"):
        topologies.kind_of(name)
    assert topologies.platform_of("v5p:4x4x4") == "tpu"
    assert topologies.platform_of("h100:4x8") == "cuda"
