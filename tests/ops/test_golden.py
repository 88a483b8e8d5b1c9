"""Golden outputs and gradients, computed in float64 by an independent implementation.

tests/data/ops.npz was made with flash-linear-attention 0.6.0 (torch 2.13, float64, stored as
float32): its recurrent and its chunked reference agreed to the rounding of the stored numbers.
There k, v and beta have T * R rows, row t * R + r being factor r of token t.
"""

import pathlib

import numpy as np
import oracle
import pytest
from helpers import record, relative_error, run
from quick import quick

DATA = np.load(pathlib.Path(__file__).parents[1] / "data" / "ops.npz")
NAMES = [str(name) for name in DATA["cases"]]
GRADIENTS = {"q": "dq", "k": "dk", "v": "dv", "beta": "dbeta", "g": "dg", "initial_state": "dh0"}


def load(name):
    """Inputs, options, cotangents and expected results, in our layout; packed rows unpacked."""
    stored = {key.split("/", 1)[1]: DATA[key] for key in DATA.files if key.startswith(f"{name}/")}
    R = int(stored["num_householder"])
    if "cu_seqlens" in stored:
        unpack = _unpacker(stored["cu_seqlens"])
        for key in ("q", "o", "do", "dq", "g", "dg"):
            if key in stored:
                stored[key] = unpack(stored[key], 1)
        for key in ("k", "v", "beta", "dk", "dv", "dbeta"):
            stored[key] = unpack(stored[key], R)
    B, T = stored["q"].shape[:2]
    for key in ("k", "v", "beta", "dk", "dv", "dbeta"):
        stored[key] = stored[key].reshape(B, T, R, *stored[key].shape[2:])
    inputs = {key: stored.get(key) for key in GRADIENTS}
    options = {
        "scale": float(stored["scale"]),
        "use_qk_l2norm": bool(stored["use_qk_l2norm"]),
    }
    expected = {"o": stored["o"], "final_state": stored["final_state"]}
    gradients = {key: stored[d] for key, d in GRADIENTS.items() if d in stored}
    return inputs, options, (stored["do"], stored["dht"]), expected, gradients


def _unpacker(cu_seqlens):
    """Rows of one sequence each, zero behind its end: beta = 0 and g = 0 change no state there."""
    lengths = np.diff(cu_seqlens)

    def unpack(x, rows_per_token):
        parts = np.split(x[0], cu_seqlens[1:-1] * rows_per_token)
        longest = lengths.max() * rows_per_token
        return np.stack(
            [np.pad(p, [(0, longest - len(p))] + [(0, 0)] * (p.ndim - 1)) for p in parts]
        )

    return unpack


def assert_close(outputs, gradients, expected, expected_gradients, tolerance):
    assert gradients.keys() == expected_gradients.keys()
    if "g" in gradients:
        # A decay behind the end of an unpacked row would act on its final state; nobody applies it.
        real = np.any(expected_gradients["v"] != 0, axis=(2, 4))
        gradients = {**gradients, "g": np.where(real, gradients["g"], 0)}
    of_outputs = {
        n: relative_error(x, expected[n])
        for n, x in zip(("o", "final_state"), outputs, strict=True)
    }
    of_gradients = {f"d{n}": relative_error(gradients[n], expected_gradients[n]) for n in gradients}
    over = {n: e for n, e in (of_outputs | of_gradients).items() if not e <= tolerance}
    assert not over, over
    return of_outputs, of_gradients


@pytest.mark.parametrize("name", NAMES)
def test_oracle(name):
    inputs, options, cotangents, expected, expected_gradients = load(name)
    o, final, gradients = oracle.delta_product(**inputs, **options, cotangents=cotangents)
    if inputs["initial_state"] is None:
        gradients.pop("initial_state")
    assert_close((o, final), gradients, expected, expected_gradients, 1e-6)


# Where the others differ from these, test_accuracy.py has cases of the kind.
FAST = ("n4_t63_gated_betaedges",)


@pytest.mark.parametrize(
    ("name", "implementation"),
    # The oracle passes all of them, and the accuracy tests hold every implementation to the oracle.
    [
        pytest.param(name, "chunked", marks=[] if name in FAST else pytest.mark.slow)
        for name in NAMES
    ]
    + [("n2_varlen_gated", "recurrent")]
    + [("n2_t7_ungated_rawkeys", "associative")],
)
def test_implementation(name, implementation):
    inputs, options, cotangents, expected, expected_gradients = load(name)
    outputs, gradients = run(inputs, cotangents, implementation=implementation, **options)
    checked = assert_close(outputs, gradients, expected, expected_gradients, 1e-5)
    record(implementation, "float32", *checked)


@pytest.mark.parametrize("implementation", quick(["recurrent", "chunked"], ["chunked"]))
def test_packed_row_with_segment_ids(implementation):
    """The packed case that starts from zero, in one row as it is stored."""
    name = "n3_varlen_ungated"
    stored = {key.split("/", 1)[1]: DATA[key] for key in DATA.files if key.startswith(f"{name}/")}
    bounds = stored["cu_seqlens"]
    ids = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))[None]
    inputs = {key: stored.get(key) for key in GRADIENTS}
    R = int(stored["num_householder"])
    for key in ("k", "v", "beta"):
        inputs[key] = inputs[key].reshape(1, ids.size, R, *inputs[key].shape[2:])
    # The stored gradients include those through final states that a packed row does not return.
    cotangents = stored["do"], np.zeros_like(stored["dht"][-1:])
    (o, final), _ = run(
        inputs,
        cotangents,
        segment_ids=ids,
        scale=float(stored["scale"]),
        implementation=implementation,
    )
    assert relative_error(o, stored["o"]) < 1e-5
    assert relative_error(final, stored["final_state"][-1:]) < 1e-5
