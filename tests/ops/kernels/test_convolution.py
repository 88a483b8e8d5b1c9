"""The GPU kernels of short convolutions without a GPU: interpreted, and compiled ahead of time."""

import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from children import printed
from ops.kernels.convolution_cases import BARS, over_the_bar

from deltaproduct_jax.ops.convolution import selection
from deltaproduct_jax.ops.kernels.triton import tiling
from deltaproduct_jax.ops.kernels.triton.short import passes as short_passes
from experiments.lib import environment

TESTS, CHILD = Path(__file__).parents[2], Path(__file__).parent / "convolution_child.py"
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"


def child(mode: str, *every: str) -> dict:
    """Runs convolution_child.py in a process of its own: the interpreter is chosen at import."""
    if not environment.extra_folder("gpu").exists():
        pytest.skip("needs Triton (tests/run.py --extra=gpu)")
    path = [environment.extra_folder("gpu"), TESTS, TESTS.parent]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "XLA_FLAGS": FLAGS}
    variables["TRITON_INTERPRET"] = "1" if mode == "interpret" else "0"
    command = [sys.executable, "-W", "ignore", str(CHILD), mode, *every]
    return json.loads(printed(command, env=variables))


@pytest.fixture(scope="module")
def everything():
    return child("interpret", "all") | child("compile")


def check_errors(found, at_least):
    assert len(found) >= at_least
    assert {dtype for dtype, _ in found.values()} == set(BARS)
    assert not over_the_bar(found)


def test_outputs_and_gradients_are_those_of_the_oracle():
    check_errors(child("interpret")["errors"], at_least=6)


@pytest.mark.slow
def test_all_outputs_and_gradients_are_those_of_the_oracle(everything):
    check_errors(everything["errors"], at_least=18)


@pytest.mark.slow
def test_a_mapped_convolution_is_the_plain_one(everything):
    assert everything["vmap"] < 1e-5
    assert everything["vmap, no taps"] < 1e-5


@pytest.mark.slow
def test_over_a_mesh_it_is_the_plain_one(everything):
    """Rows, channels and tokens cut, also into pieces with fewer than are read before a token."""
    meshes = everything["meshes"]
    assert len(meshes) == 4
    assert max(meshes.values()) < 1e-5, meshes
    assert max(everything["meshes, no taps"].values()) < 1e-5
    assert everything["explicit"] < 1e-5


@pytest.mark.slow
def test_a_layer_is_the_plain_one(everything):
    """Packed, padded, from a state; which of op and convolution takes lengths only rounds."""
    assert everything["layer"] < 1e-5
    assert everything["layer, no convolution"] < 1e-5


@pytest.mark.slow
def test_all_compile_for_hopper_and_spill_nothing(everything):
    rows = everything["rows"]
    assert len(rows) == 26
    assert not any(row["spilt_bytes"] for row in rows.values()), rows
    assert not any(row["atomics"] for row in rows.values()), rows  # sums have one order
    assert all(row["programs_a_multiprocessor"] >= 2 for row in rows.values()), rows


@pytest.mark.slow
def test_kernels_of_short_rows_compile_for_hopper(everything):
    rows = everything["short"]
    assert set(rows) == set(short_passes.CUTS)
    assert not any(row["atomics"] for row in rows.values()), rows
    # One has a sum in registers beside two tiles, one all that it writes: no room for some numbers.
    spilt = {name: row["spilt_bytes"] for name, row in rows.items() if row["spilt_bytes"]}
    assert spilt.pop("short_head_back") < 64
    assert spilt.pop("short_mlp_back", 0) <= 168
    assert not spilt
    assert rows["short_mlp_back"]["spills_in_loops"] == 0


@pytest.mark.slow
def test_a_layer_lowered_for_cuda_holds_the_kernels_where_they_are_chosen(everything):
    lowered = everything["lowered"]
    # Of q, k and v together one forward and one on the way back, beside the seven of the op.
    assert lowered["triton"] == lowered["None"] == 9
    assert lowered["plain"] == 7
    assert lowered["None, other op"] == 0
    # Of q and k.
    assert lowered["None, no convolution"] == 11
    assert lowered["plain, no convolution"] == 7
    # Of a block a norm, an output and a SwiGLU more, each way, and the embedding's gradient. What
    # convolutions made is kept like the results of the op, or they, the op and norms run again.
    assert (lowered["products"], lowered["blocks"]) == (16, 22)


@pytest.mark.slow
def test_what_cannot_run_says_so(everything):
    said = everything["said"]
    text = "conv_implementation='triton' runs on cuda only; 'plain' runs anywhere"
    assert text in said["on a CPU"]
    assert "cannot run this: conv_size is 5; it takes 2 to 4; 'plain' can" in said["taps"]
    assert 'name conv_implementation="plain" for second derivatives' in said["twice"]


REQUEST = {"op": "triton", "B": 2, "T": 64, "C": 512, "head_width": 128, "unit_width": 128}
REQUEST |= {"dtype": jnp.bfloat16}


@pytest.mark.parametrize(
    ("platform", "change", "expected"),
    [
        ("cuda", {}, "triton"),
        ("cpu", {}, "plain"),
        ("tpu", {}, "plain"),
        ("cuda", {"op": "chunked"}, "plain"),
        ("cuda", {"T": 1}, "plain"),
        ("cuda", {"conv_size": None}, "triton"),
        ("cuda", {"conv_size": 5}, "plain"),
        ("cuda", {"activation": jax.nn.relu}, "plain"),
        ("cuda", {"unit_width": 1024}, "plain"),
        ("cuda", {"dtype": jnp.float64}, "plain"),
        ("cuda", {"B": 65536}, "triton"),
    ],
)
def test_the_rule_can_be_asked(monkeypatch, platform, change, expected):
    monkeypatch.setattr(selection.kernels, "is_installed", lambda name: True)
    monkeypatch.setattr(selection.kernels.load("triton"), "is_ready", lambda: True)
    assert selection.select_convolution(platform, **REQUEST | change) == expected


def test_an_unknown_platform_or_name_is_an_error():
    with pytest.raises(ValueError, match="platform='gpu' is not known; it may be one of 'cpu'"):
        selection.select_convolution("gpu", **REQUEST)
    with pytest.raises(ValueError, match="conv_implementation='xla' is not available; it may be"):
        selection.choose("xla", (), op=str, B=1, T=1, conv_size=4, dtype=jnp.float32)


@pytest.mark.parametrize("channels", [1, 20, 96, 736, 1024, 2048])
@pytest.mark.parametrize("width", [None, 4])
def test_every_channel_has_a_place_in_a_program(channels, width):
    if width and channels % width:
        width = 1
    for backward in (False, True):
        cut = tiling.convolution_for(channels, width, backward=backward)
        assert channels % cut.width == 0
        assert cut.columns >= cut.width
        for size in (cut.rows, cut.columns):
            assert size & (size - 1) == 0
        assert cut.rows * cut.columns <= 1024


@pytest.mark.parametrize("groups", [(4, 8, 8), (6, 12, 24), (1, 3, 5), (64, 64, 64)])
@pytest.mark.parametrize("width", [32, 48, 512])
def test_side_by_side_a_program_has_channels_of_one(groups, width):
    for backward in (False, True):
        cut = tiling.parts_for(groups, width, backward=backward)
        assert all(count % cut.rows == 0 for count in groups)
        assert cut.width == width <= cut.columns
        assert cut.rows & (cut.rows - 1) == 0
        assert cut.rows * cut.columns <= 512
        assert cut.warps & (cut.warps - 1) == 0
