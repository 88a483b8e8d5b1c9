"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled ahead of time."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import bars
import jax
import pytest
from children import printed

from deltaproduct_jax.compilers.gpu import spills_in_loops
from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.triton import narrow
from deltaproduct_jax.ops.layout import Tokens
from experiments.lib import environment

TESTS = Path(__file__).parents[2]
DTYPES = ("float32", "float16", "bfloat16")
# Twice the bar where reflections keep rounding.
REFLECTED, OVER_REFLECTED = ("beta 2, float16", "beta 2, bfloat16"), 2
# What XLA compiles for the CPU here is run once.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

if not environment.extra_folder("gpu").exists():
    pytest.skip("needs Triton (tests/run.py --extra=gpu)", allow_module_level=True)


def child(mode: str, *every: str) -> dict:
    """Runs triton_child.py in a process of its own: the interpreter is chosen at import."""
    path = [environment.extra_folder("gpu"), TESTS, Path(__file__).parent, TESTS.parent]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    variables |= {"XLA_FLAGS": QUICK, "TRITON_INTERPRET": "1" if mode == "interpret" else "0"}
    command = [sys.executable, "-W", "ignore", str(TESTS / "triton_child.py"), mode, *every]
    return json.loads(printed(command, env=variables))


@pytest.fixture(scope="module")
def interpreted():
    return child("interpret")


@pytest.fixture(scope="module")
def everything():
    """Of every case and pass, also what is made of them for CUDA."""
    return child("interpret", "all") | child("compile")


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_those_of_the_oracle(dtype, interpreted):
    check_errors(dtype, interpreted, at_least=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_outputs_and_gradients_are_those_of_the_oracle(dtype, everything):
    check_errors(dtype, everything, at_least=7)


def check_errors(dtype, found, at_least):
    cases = {name: e for name, e in found["errors"].items() if name.endswith(f", {dtype}")}
    assert len(cases) >= at_least
    over = {}
    for name, errors in cases.items():
        recurrent = errors.pop("recurrent", {})
        for what, error in errors.items():
            bar = bars.of(what, dtype) * (OVER_REFLECTED if name.endswith(REFLECTED) else 1)
            if not error <= max(bar, bars.OVER_PLAIN_RECURRENCE * recurrent.get(what, 0)):
                over[name, what] = error, recurrent.get(what)
    assert not over


def test_sequences_are_cut_into_pieces_where_a_case_says_so(interpreted):
    check_pieces(interpreted["pieces"], cut=1)


@pytest.mark.slow
def test_all_sequences_are_cut_into_pieces_where_a_case_says_so(everything):
    pieces = dict(everything["pieces"])
    assert pieces.pop("vmap") == [4, 5]  # of the mapped call and of the others
    check_pieces(pieces, cut=3)


def check_pieces(pieces, cut):
    assert sum("in pieces" in name for name in pieces) == cut
    for name, counts in pieces.items():
        assert counts == [5 if "in pieces" in name else 1], name


@pytest.mark.slow
def test_a_mapped_call_is_one_call_after_the_other(everything):
    assert everything["vmap"] < 1e-5
    assert everything["vmap of narrow heads"] < 1e-6


@pytest.mark.slow
def test_what_is_not_finite_stays_in_its_segment(everything):
    """Of every argument and cotangent, packed rows and others, seen by the loss and not."""
    assert len(everything["contained"]) == 2 * (8 + 6)  # of narrow heads too
    for found in everything["contained"]:
        assert found["error"] < 1e-5
        assert found["alike"]
        assert found["bad"]  # those alone from the bad token to the end of its segment


def test_a_head_that_is_not_finite_is_made_anew_and_no_other(interpreted):
    for found in interpreted["mended"]:
        assert found.pop("error") < 1e-3
        assert all(found.values()), found


def test_kernels_tell_of_bad_queries_wherever_they_stand(interpreted):
    assert interpreted["told"] == 2 * [True]


@pytest.mark.slow
def test_all_kernels_tell_of_bad_queries(everything):
    assert everything["told"] == 5 * [True]


@pytest.mark.parametrize("name", ["step", "step_in_place"])
def test_one_token_is_that_of_the_oracle(name, interpreted):
    assert max(interpreted[name].values()) < 1e-6


def test_what_is_kept_is_written_in_whole(interpreted):
    assert interpreted["kept"] == {"states": True, "X": True, "scores": True, "maps": True}


@pytest.mark.slow
def test_one_pointer_stands_for_both_in_jax_triton_of_0_4(everything):
    assert everything["lowered"]["versions"] == ["step", "step_in_place"]


@pytest.mark.slow
def test_every_launch_of_a_kernel_is_timed(everything):
    chosen, variant = everything["launches"]
    assert (chosen["chosen"], variant["chosen"], variant["warps"]) == (True, False, 4)
    assert 0 < variant["floor_ms"] < variant["ms"] <= variant["most_ms"]


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_and_keep_their_tiles_in_registers(everything):
    rows = {row["kernel"]: row for row in everything["rows"]}
    names = {"prepare", "walk", "errors", "walk_back", "gradients", "prepare, float32"}
    assert set(rows) == names | {"walk (summary)", "walk_back (summary)", "compose"}
    assert not any(row["spilt_bytes"] for row in rows.values()), rows


@pytest.mark.slow
def test_each_kernel_of_narrow_heads_has_a_warp_and_keeps_its_tiles_in_registers(everything):
    of_one = {"K": 32, "dtype": "bfloat16", "HAS_G": False, "RAW": True}
    rows = {row["kernel"]: row for row in everything["heads"] if of_one.items() <= row.items()}
    assert set(rows) == {"narrow_forward", "mend", "narrow_backward"}
    del rows["mend"]
    assert not any(row["atomics"] for row in rows.values()), rows
    assert all(_spills_little(row) for row in rows.values()), rows
    at_once = {name: row["programs_a_multiprocessor"] for name, row in rows.items()}
    assert at_once == {"narrow_forward": 12, "narrow_backward": 8}


@pytest.mark.slow
def test_all_kernels_of_narrow_heads_compile_without_atomic_instructions(everything):
    rows = everything["heads"]
    assert len(rows) == 3 * 16
    assert not any(row["atomics"] for row in rows), rows
    of_narrow_products = [row for row in rows if row["PARTS"] == 1 and not row["HAS_G"]]
    assert all(map(_spills_little, of_narrow_products)), of_narrow_products


def _spills_little(row: dict[str, Any]) -> bool:
    """Whether tiles stay in registers, but for two numbers that a third stage costs on the way."""
    most = {"narrow_forward": 2}  # and it is faster: results/gpu/LOG_narrow.md
    return row["spills_in_loops"] <= most.get(row["kernel"], 0)


def test_narrow_heads_have_kernels_of_their_own_where_they_are_many():
    """A rule of sizes, dtypes and precision."""

    def takes(B=128, H=8, K=32, V=32, dtype="bfloat16", precision=None, more=True):
        def array(*shape):
            return jax.ShapeDtypeStruct(shape, dtype)

        q, k, v = array(B, 8, H, K), array(B, 8, 2, H, K), array(B, 8, 2, H, V)
        tokens = Tokens(q, k, v, array(B, 8, 2, H), None, None)
        options = Options(1.0, precision, spans=1, interpret=False, more=more)
        return narrow.takes(tokens, options), narrow.takes_gradients(tokens, options)

    assert takes() == takes(K=24, V=16) == takes(dtype="float32") == (True, True)
    assert takes(dtype="float32", precision="default") == (True, True)
    assert takes(more=False) == (True, False)
    none = (False, False)
    assert takes(B=127) == takes(K=40) == takes(V=64) == none
    assert takes(B=1, H=2**22 - 1) == (True, True)
    assert takes(B=1, H=2**22) == none  # offsets within a block would not have 32 bits
    assert takes(precision="highest") == takes(dtype="float32", precision="highest") == none


@pytest.mark.slow
def test_the_kernels_of_all_whole_passes_spill_nothing(everything):
    rows = everything["passes"]
    assert len(rows) == 6 * (8 + 2)
    spilt = {(r["kernel"], r["num_householder"], r["gated"]): r["spilt_bytes"] for r in rows}
    assert len(spilt) == len(rows)
    assert not any(spilt.values()), spilt


@pytest.mark.slow
def test_products_of_pieces_are_counted_where_they_are_made(everything):
    rows = {row["kernel"]: row for row in everything["rows"]}
    # 8 pieces of 16 heads: 7 ends, 6 maps, both of 128 columns; 64 rows, 128 chunks a piece.
    of_chunk = 2 * 64 * 128 * 128 + 2 * 64 * 64 * 128
    assert rows["walk (summary)"]["operations"] == 2 * 16 * 128 * (7 + 6) * of_chunk
    assert rows["compose"]["operations"] == 2 * 16 * 6 * 128**3


@pytest.mark.slow
def test_products_of_the_gradient_are_counted_as_they_are_made(everything):
    rows = {row["kernel"]: row for row in everything["rows"]}
    # 32 tokens, 64 rows, 64 of 128 keys, 128 values; what spans tokens apart from what does not.
    over_values = (32 * 64 + 64 * 64 + 32 * 64 + 2 * 64 * 64) * 128
    over_keys = 4 * 32 * 64 * 64 + 4 * 64 * 64 * 64
    assert rows["gradients"]["operations"] == 2 * 2 * 128 * 128 * (over_values + over_keys)


def test_spills_in_loops_are_told_from_others():
    code = ["STL [R1], R2", "LDL R3, [R1]", "@P0 BRA 0x0010", "LDL R4, [R1]", "BRA 0x0040"]
    text = "\n".join(f"  /*{16 * i:04x}*/  {line} ;  /* 0x00 */" for i, line in enumerate(code))
    assert spills_in_loops(text) == 1


@pytest.mark.slow
def test_every_kernel_fits_a_multiprocessor(everything):
    rows = {row["kernel"]: row for row in everything["rows"]}
    assert all(
        row["shared_bytes"] > 0 and row["programs_a_multiprocessor"] for row in rows.values()
    )


@pytest.mark.slow
def test_a_program_lowered_for_cuda_holds_the_kernels(everything):
    lowered = everything["lowered"]
    # Two forward, four backward, and one behind each way that mends; forward not of what is known
    # to be finite.
    assert lowered["triton"] == lowered["None"] == lowered["packed"] == 6 + 2
    assert lowered["finite"] == 6 + 1
    assert lowered["chunked"] == lowered["on a small GPU"] == 0
    assert lowered["passes over gates"] == 0  # those of -inf are seen to where they are read
    assert lowered["step"] == [[1, 1, 0], 1]
    assert "implementation='triton' runs on cuda only" in lowered["on a CPU"]


@pytest.mark.slow
def test_a_gradient_with_large_states_keeps_what_the_kernels_make(everything):
    lowered = everything["lowered"]
    # What `prepare` makes is kept.
    assert lowered["wide"] == 5 + 2
    # In pieces three more for each pass, of which one finds maps for both.
    assert lowered["in pieces"] == 9 + 2
    assert lowered["on a CPU instead"] < 1e-6


@pytest.mark.slow
def test_a_gradient_of_many_narrow_heads_has_a_kernel_each_way_and_behind_it(everything):
    assert everything["lowered"]["narrow heads"] == 4


@pytest.mark.slow
def test_many_narrow_heads_are_activated_by_their_kernels_and_elsewhere(everything):
    raw = everything["lowered"]["raw"]
    assert raw["kernels"] == 4
    assert raw["apart"] < 1e-5
