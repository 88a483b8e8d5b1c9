"""The kernels in Gluon without a GPU: compiled, and what they take of a multiprocessor.

There is no interpreter of Gluon. `python -m experiments.hardware.gpu_check` holds them against
float64 on a GPU; experiments/results/gpu/check/ has what it printed.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from children import printed

from experiments.lib import environment

TESTS = Path(__file__).parents[2]
SHARED = 227 * 1024
# Of a walk: what ptxas moves to memory, nearly all outside of the loops over blocks. With one
# factor and kept states, the most, it moves two registers before the loop of those that prepare.
SPILT_BY_WALKS = 72
# Of `walk_back`, by K: mostly addresses that are found before the loop and read again in it.
SPILT_BY_WALKS_BACK = {64: 40, 128: 400}

if not environment.extra_folder("gluon").exists():
    pytest.skip("needs Triton 3.7 (tests/run.py --extra=gluon)", allow_module_level=True)


def child(argument: str, **more: str) -> dict:
    """Runs gluon_child.py in a process of its own, where the newer Triton is found."""
    path = [environment.extra_folder("gluon"), TESTS, TESTS.parent]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **more}
    command = [sys.executable, "-W", "ignore", str(TESTS / "gluon_child.py"), argument]
    return json.loads(printed(command, env=variables))


def compiled(**sizes) -> dict:
    """What is made of the kernels of these sizes."""
    usual = {"R": 2, "K": 128, "V": 128, "gated": True, "packed": False, "pieces": False}
    return child(json.dumps(usual | {"gradients": False} | sizes))


def check(kernels: dict, K: int = 128) -> None:
    """Every kernel fits, uses the tensor cores, and wants no scratch memory.

    Products of none wait for each other.
    """
    for name, kernel in kernels.items():
        assert kernel["shared_bytes"] <= SHARED, (name, kernel)
        assert kernel["scratch_bytes"] == 0, (name, kernel)
        assert kernel["idle_barriers"] == [], (name, kernel)
        if name in ("gate_sums", "gate_cotangents"):
            assert kernel["spilt_bytes"] == 0
            continue
        # States of two pieces are copied: neither has a map.
        of_two = name.startswith("compose") and "walk maps" not in kernels
        assert kernel["products"] > 0 or of_two, (name, kernel)
        assert not kernel["one_by_one"], (name, kernel)
        most = 0 if name == "inverse" else SPILT_BY_WALKS
        if name.startswith("walk_back"):
            most = SPILT_BY_WALKS_BACK[K]
        assert kernel["spilt_bytes"] <= most, (name, kernel)
        # Registers of all programs that are to run at once on a multiprocessor.
        programs = 4 if name == "inverse" else 1
        assert kernel["registers"] * 32 * kernel["warps"] * programs <= 65536, (name, kernel)


def test_terms_of_gates_count_for_the_tokens_that_they_span():
    errors = child("spans", TRITON_INTERPRET="1")
    assert set(errors) == {"1", "3", "8"}
    assert max(errors.values()) <= 1e-4, errors


def test_a_pass_compiles_for_hopper_and_fits():
    kernels = compiled()
    assert set(kernels) == {"gate_sums", "inverse", "walk whole"}
    # 13 work: four for each of two times 64 columns, four that prepare, one that loads. Registers
    # are handed out to four at a time, so three idle ones stand beside the loader.
    assert kernels["walk whole"]["warps"] == 16
    check(kernels)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"R": 1},
        {"R": 1, "gated": False},
        {"R": 3},
        {"R": 3, "packed": True, "pieces": True},
        {"R": 8, "gated": False, "packed": True},
        {"R": 2, "K": 64, "pieces": True},
        {"R": 2, "pieces": 2},
        {"R": 1, "V": 64},
        {"R": 2, "K": 64, "V": 64, "packed": True},
    ],
    ids=str,
)
def test_other_sizes_compile_for_hopper_and_fit(sizes):
    kernels = compiled(**sizes)
    walks = ["walk whole", "walk ends", "walk maps"]
    walks = set(walks[: {0: 1, 1: 3, 2: 2}[sizes.get("pieces", 0)]])
    assert {name for name in kernels if name.startswith("walk")} == walks
    check(kernels)


GRADIENTS = [
    {"R": 1},
    {"R": 2},
    {"R": 2, "gated": False},
    {"R": 3, "packed": True, "pieces": True},
    {"R": 8, "gated": False, "packed": True},
    {"R": 2, "K": 64, "pieces": True},
    {"R": 2, "gated": False, "pieces": 2},
    {"R": 1, "V": 64},
    {"R": 2, "K": 64, "V": 64, "packed": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", GRADIENTS, ids=str)
def test_gradients_compile_for_hopper_and_fit(sizes):
    kernels = compiled(**sizes, gradients=True)
    names = {"walk whole kept", "walk_back whole"}
    if sizes.get("pieces"):
        names |= {"walk ends", "walk_back ends"}
    if sizes.get("pieces") is True:
        names.add("walk maps")
    assert {name for name in kernels if name.startswith("walk")} == names
    check(kernels, sizes.get("K", 128))
