"""What is read of compiled programs: what they send and take, and how children compile them."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.compilers import child, tpu
from deltaproduct_jax.compilers.collectives import collectives, collectives_by_axis
from deltaproduct_jax.compilers.memory import memory_of
from deltaproduct_jax.errors import ConfigError

SENT = """
  %sum = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  %moved = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%c), channel_id=2
  %done = f32[8,4]{1,0} collective-permute-done(%moved)
  %flags = pred[16]{0} all-gather(%d), channel_id=3
  %alone = f32[512]{0} add(%e, %e)
"""


def test_sums_are_taken_apart_and_permutes_counted_once():
    assert collectives(SENT) == [
        ("all-gather", 16),
        ("all-reduce", 2 * 4),
        ("all-reduce", 4 * 2 * 3),
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
    assert (found["JAX_PLATFORMS"], found["XLA_FLAGS"]) == ("cpu", "")
    assert tpu.child_environment(Path("extra"))["LIBTPU_INIT_ARGS"] == "--a=1"


def test_libtpu_is_found_in_the_folder_of_an_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    assert tpu.libtpu_version(tmp_path) is None
    with pytest.raises(ConfigError, match=r"package libtpu, .* is not installed; get it"):
        tpu.require_libtpu(tmp_path, "get it")
    information = tmp_path / "libtpu-1.2.dist-info" / "METADATA"
    information.parent.mkdir()
    information.write_text("Metadata-Version: 2.1\nName: libtpu\nVersion: 1.2\n")
    assert tpu.libtpu_version(tmp_path) == "1.2"
    tpu.require_libtpu(tmp_path, "get it")


def test_clocks_follow_from_published_peaks():
    peaks = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
    products = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    for name, generation in tpu.GENERATIONS.items():
        np.testing.assert_allclose(2 * products[name] * generation.hertz, peaks[name], rtol=0.01)
