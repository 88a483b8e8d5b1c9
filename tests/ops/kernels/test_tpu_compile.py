"""The op compiles for TPUs, without a TPU: no solver inside, no more memory than promised."""

import json
import math
import sys

import pytest
from children import HANGS_S, once, printed
from quick import quick
from tpu_programs import GRADIENTS, LAYERS

from deltaproduct_jax.compilers import child, tpu
from experiments.lib import environment
from experiments.lib.bench import tpu_compiler
from experiments.lib.bench.timing import BACKWARD, FORWARD, Shape
from experiments.lib.bench.tpu_compiler import Compilation
from experiments.lib.compilers import compiler_version

if compiler_version("tpu") is None:
    pytest.skip("needs libtpu (tests/run.py --extra=tpu)", allow_module_level=True)

SHAPE = Shape(B=1, T=256, H=2, K=64, V=64, R=2)
CASES = [  # v6e float32 compiles for 10 seconds, with v5e's cut
    ("v5e", FORWARD, "bfloat16"),
    ("v5e", BACKWARD, "bfloat16"),
    ("v5e", BACKWARD, "float32"),
    ("v6e", FORWARD, "bfloat16"),
    ("v6e", BACKWARD, "bfloat16"),
]
# The gradient holds both kernels. 16 heads are what the vector memory of v4 has to be planned for;
# the large one's arrays do not fit on the chip.
COMPILATIONS = {
    (generation, direction, dtype): Compilation(
        generation, "chunked", direction, Shape(**{**vars(SHAPE), "dtype": dtype})
    )
    for generation, direction, dtype in CASES
} | {
    "small chip": Compilation(
        "v4", "pallas_tpu", BACKWARD, Shape(1, 128, 16, 128, 128, 2, "bfloat16")
    ),
    "large": Compilation(
        "v5e", "pallas_tpu", BACKWARD, Shape(8, 4096, 16, 128, 128, 2, "bfloat16")
    ),
}
LARGE = COMPILATIONS["large"].shape
# Large enough for its states, one every 32 tokens, not to fit on the chip, where memory is not
# counted.
LONG_SHAPE = Shape(B=1, T=8192, H=2, K=128, V=128, R=4, dtype="bfloat16")
LONG = Compilation("v5e", "chunked", BACKWARD, LONG_SHAPE)
SPAN = 32


def compiled(key) -> dict:
    """What the compiler says of a program; all are compiled by one child process."""
    return _compiled()[key]


@once
def _compiled() -> dict:
    wanted = list(COMPILATIONS.values())
    figures = tpu_compiler.compile_apart(wanted, profile=False, timeout_s=HANGS_S)
    return dict(zip(COMPILATIONS, figures, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES, ids=" ".join)
def test_the_chunked_form_compiles_without_a_solver(key):
    found = compiled(key)
    assert "error" not in found
    solvers = [name for name in found["custom_calls"] if "riangular" in name]
    assert not solvers, "on a TPU a solve costs more than all the rest"
    assert not found["collectives"]
    assert found["model_cycles"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small chip", "large"])
def test_no_loop_over_chunks_is_left_outside_the_kernels(name):
    found = compiled(name)
    assert "error" not in found, found["error"]
    assert found["custom_calls"]["tpu_custom_call"] == 2
    assert not any(found["loops"].values())


@pytest.mark.slow
def test_kernels_read_and_write_little_more_than_their_arrays():
    """Inputs twice, cotangents, and of the states, one a chunk, every second out and in again.

    With all of them it would be 1.6 times inputs, outputs and one state per chunk.
    """
    found, shape = compiled("large"), LARGE
    states = 4 * -(-shape.T * shape.R // 128) * shape.B * shape.H * shape.K * shape.V
    least = found["argument_bytes"] + found["output_bytes"] + states
    assert 1.25 * least < found["hbm_bytes"] < 1.45 * least
    # And room to run a row again: what it reads, with 0 for what is bad, and what it returns.
    of_a_row = (found["argument_bytes"] + found["output_bytes"]) / shape.B
    assert found["temp_bytes"] < 1.1 * states / 2 + of_a_row


STEPS = ("step over a mesh", "step without a layout", "step with convolutions")
PROGRAMS = (*STEPS, "transformed", "sequence", *LAYERS, *GRADIENTS)
QUICK_PROGRAMS = ("v4 bfloat16",)


def around(name) -> dict:
    """Custom calls and collectives of a program that holds the op."""
    kind = [n for n in PROGRAMS if (n in QUICK_PROGRAMS) == (name in QUICK_PROGRAMS)]
    return _around(tuple(kind))[name]


@once
def _around(names) -> dict:
    command = [sys.executable, "-m", "tests.tpu_programs", *names]
    variables = tpu.child_environment(tpu_compiler.EXTRA)
    said = printed(command, cwd=environment.ROOT, env=variables)
    return dict(zip(names, map(json.loads, said.splitlines()), strict=True))


@pytest.mark.slow
def test_a_training_step_on_256_chips_holds_the_kernels():
    """Through its layout. XLA cannot cut a kernel by itself: None then runs the chunked form."""
    found = around("step over a mesh")
    assert found["tpu_custom_call"] == 3
    assert found["all-gather"] > 0
    assert found["all-reduce"] > 0
    assert "tpu_custom_call" not in around("step without a layout")


@pytest.mark.slow
def test_convolutions_run_by_kernels_where_none_is_named():
    """Of q, k and v one forward and one on the way back each, beside the op's own, also cut."""
    for name in (*LAYERS, "step with convolutions"):
        # A layer knows that its tokens are finite: rows are run again on the way back alone.
        expected = 3 if name == "layer, plain" else 3 + 6
        assert around(name)["tpu_custom_call"] == expected, name


@pytest.mark.slow
def test_the_kernels_compile_mapped_rematerialised_packed_with_grouped_heads():
    assert around("transformed")["tpu_custom_call"] == 4
    assert "all-reduce" not in around("transformed")


@pytest.mark.parametrize("name", quick(GRADIENTS, QUICK_PROGRAMS))
def test_the_kernels_compile_for_every_generation_and_are_all_there_is(name):
    """None chooses them; `GRADIENTS` says for what. Loops run them again on what is not finite."""
    assert around(name) == {"tpu_custom_call": 4, "while": 2}


@pytest.mark.slow
def test_the_kernels_compile_along_a_cut_sequence():
    assert around("sequence")["tpu_custom_call"] == 3
    assert around("sequence")["collective-permute"] > 1


def test_a_solver_would_be_seen(monkeypatch):
    """The name that the compiler gives it: without this the test above could not fail."""
    program = (
        "import sys, jax, experiments.lib.bench.tpu_compiler as c\n"
        "from deltaproduct_jax.compilers import child\n"
        "def solve(q, k, **arrays):\n"
        "    a = k[0, :, 0, 0] @ k[0, :, 0, 0].T + 9 * jax.numpy.eye(k.shape[1])\n"
        "    return jax.lax.linalg.triangular_solve(a, q[0, :, 0], left_side=True, lower=True)\n"
        "c.IMPLEMENTATIONS['chunked'] = solve\n"
        "child.main(sys.argv[1:])\n"
    )
    monkeypatch.setattr(child, "COMMAND", [sys.executable, "-c", program])
    (found,) = tpu_compiler.compile_apart(
        [Compilation("v5e", "chunked", FORWARD, SHAPE)], profile=False, timeout_s=HANGS_S
    )
    assert any("riangular" in name for name in found["custom_calls"]), found


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_a_gradient_is_expected_to_take_longer(generation):
    forward, backward = (
        compiled((generation, direction, "bfloat16"))["model_cycles"]
        for direction in (FORWARD, BACKWARD)
    )
    assert backward > 1.5 * forward


@pytest.mark.slow  # compiles as long as all the others together; on a CPU: test_composition.py
def test_memory_of_the_gradient_is_states_of_spans_and_one_copy_of_the_inputs():
    """A state for each token would be 32 times the states, sequences of T * R tokens 3 copies."""
    (found,) = tpu_compiler.compile_apart([LONG], profile=False, timeout_s=HANGS_S)
    shape = LONG.shape
    states = 4 * shape.H * shape.K * shape.V * shape.T // SPAN
    assert 0 < found["temp_bytes"] < states + found["argument_bytes"]
    array = 2 * shape.T * shape.H * shape.K  # q, o, each factor of k and v, in bfloat16
    assert found["argument_bytes"] < 1.1 * (3 + 2 * shape.R) * array + 4 * shape.H * shape.K**2


@pytest.mark.slow
def test_the_profile_of_the_schedule_is_read():
    wanted = [Compilation(name, "scan", FORWARD, SHAPE) for name in ("v5e", "v6e")]
    for found in tpu_compiler.compile_apart(wanted, profile=True, timeout_s=HANGS_S):
        assert math.prod(found["loops"].values()) == SHAPE.T  # a loop of spans, in it one of tokens
        # Each token takes some, and fewer than its traffic with the memory would cost.
        assert SHAPE.T * 100 < found["schedule_cycles"] < found["model_cycles"]
