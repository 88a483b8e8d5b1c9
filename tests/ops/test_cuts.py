"""The cuts of other platforms, run on a CPU against the oracle; the cuts themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from bars import assert_within_bars, run_as
from helpers import Case, errors, plain_bfloat16_error, relative_error
from quick import quick

from deltaproduct_jax.ops import chunked
from deltaproduct_jax.ops.cut import Cut, cut_for, default_chunk_size, default_span
from deltaproduct_jax.ops.precision import Matmul
from deltaproduct_jax.ops.triangular import unit_lower_inverse

CASES = {
    "all at once": Case(T=300, gate="mild", G=2, K=12, V=6, segments=True, l2norm=True),
    "three factors, ungated": Case(T=100, R=3, B=1, gate=None, H=1, V=12),
    "strong decay": Case(T=160, B=1, gate="mixed"),
    "beta 2, parallel keys": Case(T=160, B=1, beta=(2.0, 2.0), keys="parallel", gate="slow"),
}


@pytest.fixture(params=["default", "tpu"])
def as_elsewhere(request, monkeypatch):
    run_as(request.param, monkeypatch)
    yield
    jax.clear_caches()


ALSO_OPTIMISED = pytest.mark.parametrize(
    "optimised", [False, pytest.param(True, marks=pytest.mark.slow)]
)


@ALSO_OPTIMISED
@pytest.mark.parametrize("name", quick(CASES, ["beta 2, parallel keys"]))
@pytest.mark.parametrize("dtype", quick(["float32", "bfloat16"], ["bfloat16"]))
def test_other_platforms_cuts(name, dtype, optimised, as_elsewhere):
    case = CASES[name]
    if dtype == "bfloat16" and name != "three factors, ungated":
        case = Case(T=256, B=1, gate="mild", K=16, V=16, beta=case.beta, l2norm=True)
    assert_within_bars(case, "chunked", dtype, optimised=optimised)


@ALSO_OPTIMISED
@pytest.mark.parametrize("gate", quick(["slow", None], ["slow"]))
@pytest.mark.parametrize("keys", quick(["unit", "identical", "parallel"], ["parallel"]))
def test_reflections_in_bfloat16_err_like_plain_products(keys, gate, optimised, as_elsewhere):
    """Applied in one pass, the inverse would make errors of five to thirty times these."""
    case = Case(T=192, B=1, H=1, K=32, V=32, beta=(2.0, 2.0), keys=keys, gate=gate, seed=1)
    of_outputs, of_gradients = errors(case, "chunked", "bfloat16", optimised=optimised)
    plain = plain_bfloat16_error(case)
    assert max(of_outputs.values()) <= 2 * plain
    assert max(of_gradients.values()) <= 3 * plain


class ThreePasses(Matmul):
    """What a TPU does for precision "high": the three largest products of bfloat16 parts."""

    def __call__(self, equation, x, y):
        def split(x):
            high = x.astype(ml_dtypes.bfloat16).astype(x.dtype)
            return high, (x - high).astype(ml_dtypes.bfloat16).astype(x.dtype)

        (a, b), (c, d) = split(x), split(y)
        product = super().__call__
        return product(equation, a, c) + product(equation, a, d) + product(equation, b, c)


@ALSO_OPTIMISED
@pytest.mark.parametrize("keys", quick(["unit", "parallel"], ["parallel"]))
def test_three_passes_are_enough_with_bfloat16_inputs(keys, optimised, monkeypatch):
    """The error against float64 is that of an exact inverse, by which bfloat16 is multiplied."""
    case = Case(
        T=128, R=1, B=1, K=16, V=16, beta=(1.5, 2.0), keys=keys, gate="slow", chunk_size=128
    )
    run_as("tpu", monkeypatch)
    exact = errors(case, "chunked", "bfloat16", optimised=optimised)
    real = chunked.unit_lower_inverse
    monkeypatch.setattr(
        chunked,
        "unit_lower_inverse",
        lambda lower, matmul, **kw: real(lower, ThreePasses(**dataclasses.asdict(matmul)), **kw),
    )
    jax.clear_caches()
    passes = errors(case, "chunked", "bfloat16", optimised=optimised)
    jax.clear_caches()
    for of_exact, of_passes in zip(exact, passes, strict=True):
        for name, error in of_passes.items():
            assert error <= 1.1 * of_exact[name], name


@pytest.mark.parametrize("M", [1, 8, 24, 32, 48, 128])
def test_the_inverse_by_half_of_the_rows_is_the_inverse(M):
    rng = np.random.default_rng(M)
    lower = np.tril(rng.uniform(-1, 1, size=(2, 3, M, M)) / M**0.5, -1).astype(np.float32)
    multiplied = []

    class Counted(Matmul):
        def __call__(self, equation, x, y):
            multiplied.append(x.shape[-2])
            return super().__call__(equation, x, y)

    matmul = Counted(np.dtype(np.float32), jax.lax.Precision.HIGHEST)
    got = unit_lower_inverse(jnp.asarray(lower), matmul, half_rows=True)
    assert relative_error(got, np.linalg.inv(np.eye(M) + lower.astype(np.float64))) < 1e-6
    halved = {32: [16] * 2, 128: [64] * 4}  # width 8 of 32; widths 8, 16 and 32 of 128
    assert multiplied.count(M // 2) >= len(halved.get(M, []))
    assert (M in multiplied) == (M > 4)


@pytest.mark.parametrize("platform", ["cpu", "default", "tpu"])
@pytest.mark.parametrize("T", [1, 2, 7, 40, 64, 100, 129, 1024])
def test_cuts_fit_together(platform, T):
    sizes = {"T": T, "R": 3, "K": 64, "V": 32}
    span = default_span("bfloat16", **sizes)
    spans = -(-T // span)
    chunk_size = default_chunk_size(platform, "bfloat16", **sizes)
    cut = cut_for(platform, span, chunk_size, B=2, Hv=4, **sizes)
    assert cut.span % cut.chunk_size == 0
    assert spans % cut.spans_at_once == 0
    assert cut.chunk_size * 3 <= 128 or cut.chunk_size == 1
    # At most one chunk of a CPU is padded for every span.
    assert spans * span - T < spans * default_chunk_size("cpu", "bfloat16", **sizes)


def test_a_tpu_works_on_short_sequences_at_once_and_on_large_batches_span_by_span():
    sizes = {"R": 2, "Hv": 4, "K": 128, "V": 64}
    assert cut_for("tpu", 64, 64, B=1, T=1024, **sizes) == Cut(64, 64, 16)
    assert cut_for("tpu", 64, 64, B=32, T=4096, **sizes) == Cut(64, 64, 1)
    assert cut_for("default", 64, 32, B=16, T=4096, **sizes) == Cut(64, 32, 4)
    assert cut_for("cpu", 64, 16, B=32, T=4096, **sizes) == Cut(64, 16, 1)
    assert Cut(64, 16).chunks_at_once == 4
    assert Cut(64, 32, 4).chunks_at_once == 8


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"platform": "gpu"}, "platform='gpu' is not known; it may be one of 'cpu', 'tpu', 'cuda'"),
        ({"dtype": "int8"}, "dtype='int8' must be a dtype among"),
        ({"R": 0}, "R must be a whole number of at least 1, got 0"),
        ({"K": 2.5}, "K must be a whole number of at least 1, got 2.5"),
        ({"T": -1}, "T must be a whole number of at least 0, got -1"),
        ({"V": True}, "V must be a whole number of at least 1, got True"),
    ],
)
def test_a_chunk_size_of_nothing_is_refused(values, says, unchecked):
    sizes = {"platform": "cpu", "dtype": "float32", "T": 9, "R": 2, "K": 64, "V": 64} | values
    with pytest.raises(ValueError, match=says):
        default_chunk_size(sizes.pop("platform"), sizes.pop("dtype"), **sizes)
