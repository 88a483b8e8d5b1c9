"""Gradients of bad heads on GPUs, without a GPU: mended_child.py in Triton's interpreter."""

import json
import os
import sys
from pathlib import Path

import bars
import pytest
from children import printed

from experiments.lib import environment

TESTS = Path(__file__).parents[2]
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

if not environment.extra_folder("gpu").exists():
    pytest.skip("needs Triton (tests/run.py --extra=gpu)", allow_module_level=True)


def child(mode: str, *every: str):
    """Runs mended_child.py in a process of its own: the interpreter is chosen at import."""
    path = [environment.extra_folder("gpu"), TESTS, Path(__file__).parent, TESTS.parent]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    variables |= {"XLA_FLAGS": QUICK, "TRITON_INTERPRET": "1" if mode == "interpret" else "0"}
    script = Path(__file__).with_name("mended_child.py")
    command = [sys.executable, "-W", "ignore", str(script), mode, *every]
    return json.loads(printed(command, env=variables))


def check(found):
    """NaN where "chunked" has it, the same numbers elsewhere, and good heads as they were."""
    for name, case in found.items():
        assert case["alike"], (name, case)
        dtype = next((x for x in ("bfloat16", "float16") if x in name), "float32")
        assert case["error"] < bars.of("dq", dtype), (name, case)


def test_gradients_are_those_of_the_contained_form():
    found = child("interpret")
    assert len(found) == 13
    check({"v, bfloat16" if name == "v" else name: case for name, case in found.items()})
    # Behind what nobody asks for all is exact; what is asked for is NaN, and no more.
    quiet = {name for name, case in found.items() if case["nan"] == 0}
    assert quiet == {"k", "v", "beta", "g", "q", "initial_state"}
    loud = found.keys() - quiet - {"v, asked for"}
    assert all(found[name]["exact"] for name in quiet | loud)


@pytest.mark.slow
def test_all_gradients_are_those_of_the_contained_form():
    """And by dbeta kernels tell of each argument and cotangent, of nothing else."""
    found = child("interpret", "all")
    assert found.pop("told") == 5 * [8 * [True] + [False]]
    assert len(found) == 13 + 9
    check({"v, bfloat16" if name == "v" else name: case for name, case in found.items()})


@pytest.mark.slow
def test_the_kernel_spills_little():
    rows = {row["K"]: row for row in child("compile")}
    assert rows[128]["spilt_bytes"] == rows[256]["spilt_bytes"] == 0
    assert rows[32]["spilt_bytes"] < 64
    # All programs of a call run at once.
    assert all(row["programs"] <= 132 * row["programs_a_multiprocessor"] for row in rows.values())
