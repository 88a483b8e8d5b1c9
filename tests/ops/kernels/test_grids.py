"""Launches of the GPU kernels on sizes beyond 65,535 programs and 2^31 numbers, without a GPU.

That a grid in a line runs the same programs the interpreter shows, in test_triton.py and
test_convolution.py; here, that no grid is too long, and that no offset wraps around.
"""

import itertools
import json
import math
import os
import sys
from pathlib import Path

import pytest
from children import printed

from deltaproduct_jax.compilers.index_ranges import overflows
from deltaproduct_jax.ops.kernels import grids
from experiments.lib import environment

TESTS = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    not environment.extra_folder("gluon").exists(),
    reason="needs Triton 3.7 (tests/run.py --extra=gluon)",
)


def child(*arguments: str) -> dict:
    """Runs grids_child.py in a process of its own, where the newer Triton is found."""
    path = [environment.extra_folder("gluon"), TESTS, TESTS.parent]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("grids_child.py")]
    return json.loads(printed([*command, *arguments], env=variables))


def cases(found: dict) -> dict:
    return {name: kernels for name, kernels in found.items() if name != "handed on"}


@pytest.fixture(scope="module")
def launched():
    return child()


def check(found: dict) -> None:
    """No grid is too long along any axis, and all offsets reach their places."""
    for case, kernels in cases(found).items():
        for kernel in kernels:
            sizes = zip(kernel["grid"], grids.MOST, strict=False)
            assert all(size <= most for size, most in sizes), (case, kernel)
            lines = kernel["lines"]
            if kernel["name"] == "logit_sums":  # finds one logit by its target, below V
                assert [line.partition(":")[0] for line in lines] == ["not followed"]
                continue
            assert not lines, (case, kernel["name"], lines[:3])


@needs_triton
def test_a_grid_is_handed_on_in_a_line_from_65536_programs_on(launched):
    short, long, short_by_gluon, long_by_gluon = launched["handed on"]
    assert short == {"grid": [2, 65535], "GX": 0, "GY": 0} == short_by_gluon
    assert long == {"grid": [2 * 131072], "GX": 2, "GY": 131072}
    assert long_by_gluon == {"grid": [2 * 70000], "GX": 2, "GY": 70000}


@needs_triton
def test_no_launch_is_too_long_and_no_offset_wraps_around(launched):
    check(launched)
    in_line = {x["name"] for kernels in cases(launched).values() for x in kernels if x["in_line"]}
    assert {"logit_back", "step", "convolve", "convolve_parts_back", "inverse"} <= in_line


@needs_triton
@pytest.mark.slow
def test_no_launch_of_any_case_is_too_long_and_no_offset_of_any_wraps_around():
    check(child("all"))


@needs_triton
@pytest.mark.slow
def test_offsets_of_every_kernel_that_wrap_around_are_found():
    found = child("wrapped", "all")
    kernels = list(itertools.chain(*cases(found).values()))
    told = {x["name"] for x in kernels if any(" to " in line for line in x["lines"])}
    # Of few pieces and sequences `compose` has no more than 2^31 numbers.
    assert told >= {x["name"] for x in kernels} - {"compose"}
    assert len(told) >= 20


FUNCTION = """
module {
  tt.func public @copy(%x: !tt.ptr<f32>) attributes {noinline = false} {
    %c4096_i32 = arith.constant 4096 : i32
    %c0_i32 = arith.constant 0 : i32
    %c1_i32 = arith.constant 1 : i32
    %row = tt.get_program_id x : i32
    %end = scf.for %i = %c0_i32 to %c4096_i32 step %c1_i32 iter_args(%at = %row) -> (i32)  : i32 {
      %next = arith.addi %at, %c4096_i32 : i32
      scf.yield %next : i32
    }
    %0 = arith.muli %row, %c4096_i32 : i32
    %1 = tt.addptr %x, %0 : !tt.ptr<f32>, i32
    tt.return
  }
}
"""


def test_an_offset_is_told_of_from_the_first_size_on_that_wraps_it_around():
    assert overflows(FUNCTION, (2**19,)) == []
    told = overflows(FUNCTION, (2**19 + 1,))
    assert [line.partition(":")[0] for line in told] == [f"0 to {2**31}", "not followed"]
    # What a loop carries is drawn out over its rounds.
    assert overflows(FUNCTION.replace("4096 : i32", "65536 : i32"), (1,))


LINE = ("GX", "GY")


def test_a_grid_that_is_short_enough_stays_as_it_is():
    for grid in ((2**31 - 1,), (7, 65535), (3, 65535, 65535)):
        assert grids.fitted("step", grid, LINE) == (grid, {"GX": 0, "GY": 0})


@pytest.mark.parametrize("grid", [(8, 131072), (2, 3, 65536), (1, 65536, 5)])
def test_programs_of_a_grid_in_a_line_keep_their_order(grid):
    (programs,), line = grids.fitted("step", grid, LINE)
    assert programs == math.prod(grid)
    x, y = line["GX"], line["GY"]
    for z, b, a in itertools.islice(itertools.product(*map(range, (*grid, 1)[2::-1])), 1000):
        pid = a + x * (b + y * z)
        assert (pid % x, pid // x % y, pid // (x * y)) == (a, b, z)


def test_more_programs_than_a_launch_can_have_are_refused():
    with pytest.raises(ValueError, match=r"kernel errors would have 4,295,032,832 programs; a GPU"):
        grids.fitted("errors", (1, 65536, 65537), LINE)


def test_a_kernel_that_would_not_find_its_place_in_a_line_is_not_launched():
    assert grids.fitted("narrow_forward", (65536,), ())[0] == (65536,)
    with pytest.raises(
        ValueError, match=r"kernel walk takes no grid of \(1, 65536\), since it has"
    ):
        grids.fitted("walk", (1, 65536), ("T",))
