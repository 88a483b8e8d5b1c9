"""Every implementation against the float64 oracle, outputs and all gradients."""

import dataclasses

import pytest
from bars import assert_within_bars
from helpers import Case, errors
from quick import quick

CASES = {
    "no token": Case(T=0, R=2),
    "one token": Case(T=1, R=3, K=4, V=6),
    "ungated, one factor": Case(T=7, R=1, gate=None, state=False, K=5, V=3),
    "five factors": Case(T=7, R=5, gate="mild", segments=True, chunk_size=4),
    "one short of a chunk": Case(T=63, R=2, gate=None, chunk_size=64, H=1, V=12),
    "exactly four chunks": Case(T=64, R=2, gate="slow", chunk_size=16, G=2),
    "one over": Case(T=65, R=3, gate="mild", chunk_size=32, B=1, l2norm=True, scale=1.0),
    "grouped, ungated, packed": Case(T=65, R=2, gate=None, G=3, H=1, segments=True),
    "all at once": Case(
        T=130,
        R=2,
        gate="mild",
        G=2,
        K=12,
        V=6,
        segments=True,
        l2norm=True,
        scale=0.3,
        chunk_size=24,
    ),
    "beta up to 1": Case(T=130, R=1, B=1, gate=None, beta=(0.0, 1.0)),
}

QUICK = ("no token", "one token", "ungated, one factor", "all at once")

# The cases that the two plain implementations run too.
PLAIN = ("no token", "five factors", "grouped, ungated, packed", "all at once")

# What people run by default is tested as they run it: fully optimised, the rest when --slow.
OPTIMISED = (("beta 2, parallel keys", "float32"),)

# Those that a kernel runs, interpreted; KERNEL_HARD are of the hard ones below.
KERNEL = ("no token", "one token", "five factors", "grouped, ungated, packed")
KERNEL_NARROW = ("one short of a chunk", "all at once", "beta up to 1")
KERNEL_HARD = ("beta 2, parallel keys", "g of all sizes")

# The chunk size is the default one: with beta = 2 and equal keys the rounding of k_m . k_n
# enters coherently, so the chunked form's error grows with the chunk (1e-5 near 64 updates).
HARD = {
    "beta 2, identical keys": Case(T=64, beta=(2.0, 2.0), keys="identical"),
    "beta 2, parallel keys": Case(T=64, beta=(2.0, 2.0), keys="parallel", gate="slow"),
    "beta 2, parallel, ungated": Case(T=64, beta=(2.0, 2.0), keys="parallel", gate=None),
    "g = 0": Case(T=40, R=3, gate="zero", chunk_size=8),
    "g = -20 everywhere": Case(T=40, gate="strong", chunk_size=16),
    "g = -20 every 8th": Case(T=64, gate="every8", chunk_size=32),
    "g = -1e4": Case(T=40, gate="extreme", chunk_size=16, segments=True),
    "g of all sizes": Case(T=40, gate="mixed", chunk_size=16, G=2),
}


def affordable(case, implementation):
    """The associative scan unrolls log2 T levels, whose compilation would take most of the run."""
    if implementation == "associative":
        return dataclasses.replace(case, T=min(case.T, 5), B=1)
    return case


def matrix(names, kept):
    """Every case for the chunked form, which has most to go wrong; a few for the plain ones."""
    plain = [name for name in names if name in PLAIN]
    pairs = [(name, "chunked") for name in names]
    pairs += [(name, i) for name in plain for i in ("recurrent", "associative")]
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(*pair, marks=marks[pair[0] in kept]) for pair in pairs]


@pytest.mark.parametrize(("name", "implementation"), matrix(CASES, QUICK))
def test_float32(name, implementation):
    assert_within_bars(affordable(CASES[name], implementation), implementation, "float32")


@pytest.mark.parametrize(
    ("name", "implementation"), matrix(["all at once", "one short of a chunk"], [])
)
def test_float64(name, implementation):
    assert_within_bars(affordable(CASES[name], implementation), implementation, "float64")


@pytest.mark.parametrize(
    ("name", "implementation"),
    matrix(["one short of a chunk", "all at once", "beta up to 1"], QUICK),
)
def test_bfloat16(name, implementation):
    assert_within_bars(affordable(CASES[name], implementation), implementation, "bfloat16")


ALSO_OPTIMISED = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in OPTIMISED else pytest.mark.slow)
    for names, dtype in (
        ((*CASES, *HARD), "float32"),
        (("all at once", "one short of a chunk"), "float64"),
        (("one short of a chunk", "all at once", "beta up to 1"), "bfloat16"),
    )
    for name in names
]


@pytest.mark.parametrize(("name", "dtype"), ALSO_OPTIMISED)
def test_chunked_fully_optimised(name, dtype):
    assert_within_bars({**CASES, **HARD}[name], "chunked", dtype, optimised=True)


@pytest.mark.parametrize("implementation", quick(["recurrent", "chunked"], ["recurrent"]))
def test_float16(implementation):
    """Only inputs, outputs and gradients are rounded, to 2^-12 each."""
    optimised = implementation == "chunked"
    of_outputs, of_gradients = errors(
        CASES["all at once"], implementation, "float16", optimised=optimised
    )
    assert max(of_outputs.values()) < 5e-4
    assert max(of_gradients.values()) < 1e-3


@pytest.mark.parametrize("name", quick(["one short of a chunk", "all at once"], ["all at once"]))
@pytest.mark.slow
def test_precision_highest_removes_the_rounding_of_bfloat16_operands(name):
    """What remains is the rounding of o and of the gradients themselves, 2^-9 each."""
    of_outputs, of_gradients = errors(
        CASES[name], "chunked", "bfloat16", precision="highest", optimised=True
    )
    assert of_outputs["o"] < 4e-3
    assert of_outputs["final_state"] < 1e-5
    assert max(of_gradients.values()) < 8e-3


@pytest.mark.slow
def test_precision_highest_keeps_normalised_keys_at_unit_length():
    """Reflections by keys that were rounded to bfloat16 would be off by 1e-2 here."""
    case = Case(T=128, B=1, gate=None, beta=(2.0, 2.0), l2norm=True)
    of_outputs, _ = errors(case, "chunked", "bfloat16", precision="highest", optimised=True)
    assert of_outputs["o"] < 4e-3
    assert of_outputs["final_state"] < 1e-5


@pytest.mark.parametrize(
    "name", quick(HARD, ["beta 2, parallel, ungated", "g = -1e4", "g of all sizes"])
)
def test_hard_inputs(name):
    assert_within_bars(HARD[name], "chunked", "float32")


@pytest.mark.parametrize("name", quick(KERNEL, ["no token"]))
def test_kernels_float32(name):
    assert_within_bars(CASES[name], "pallas_tpu", "float32")


@pytest.mark.parametrize("name", quick(KERNEL_NARROW, ["beta up to 1"]))
@pytest.mark.slow
def test_kernels_bfloat16(name):
    assert_within_bars(CASES[name], "pallas_tpu", "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL_HARD)
def test_kernels_hard_inputs(name):
    assert_within_bars(HARD[name], "pallas_tpu", "float32")


@pytest.mark.parametrize("implementation", ["recurrent", "associative"])
@pytest.mark.parametrize("name", ["g of all sizes"])
def test_hard_inputs_elsewhere(name, implementation):
    assert_within_bars(affordable(HARD[name], implementation), implementation, "float32")


@pytest.mark.slow
def test_long_sequence():
    case = Case(T=4096, R=1, B=1, H=1, K=4, V=4, gate=None, state=False)
    assert_within_bars(case, "chunked", "float32", optimised=True)


@pytest.mark.slow
@pytest.mark.parametrize("gate", [None, "slow"])
def test_very_long_sequence(gate):
    case = Case(T=65536, R=2, B=1, H=1, K=8, V=8, gate=gate, beta=(2.0, 2.0))
    assert_within_bars(case, "chunked", "float32", optimised=True)
