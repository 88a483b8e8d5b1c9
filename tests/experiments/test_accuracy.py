"""The table of errors: its reference, its inputs, its bars, and what it writes."""

import json

import numpy as np
import oracle
import pytest
from helpers import relative_error

from experiments.lib import flags
from experiments.lib.bench import exact
from experiments.lib.bench.accuracy import INPUTS, Input, over_the_bars
from experiments.op import accuracy as op_accuracy

TINY = ["--length=9", "--long_length=9", "--head_dim=4", "--long_head_dim=4", "--num_heads=2"]


@pytest.mark.parametrize("block", [4, 256])
def test_the_reference_equals_the_oracle(block, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK", block)
    rng = np.random.default_rng(0)
    arrays = Input(decay="mild").arrays(rng, B=2, T=11, R=3, H=2, K=5)
    arrays["v"] = arrays["v"][..., :3]
    do, dfinal = rng.normal(size=(2, 11, 2, 3)), rng.normal(size=(2, 2, 5, 3))
    o, final_state, wanted = oracle.delta_product(**arrays, cotangents=(do, dfinal))
    outputs, gradients = exact.outputs_and_gradients(arrays, do, dfinal)
    got, wanted = outputs | gradients, {"o": o, "final_state": final_state} | wanted
    wanted = {name: x for name, x in wanted.items() if name in got}
    assert got.keys() == wanted.keys() == {"o", "final_state", "q", "k", "v", "beta", "g"}
    for name in got:
        assert relative_error(got[name], wanted[name]) < 1e-14, name
    for name, x in exact.outputs(arrays).items():
        assert relative_error(x, wanted[name]) < 1e-14
    zeroed = exact.outputs(arrays, rounded=np.zeros_like)
    assert not zeroed["o"].any()
    assert not zeroed["final_state"].any()


def test_inputs_are_what_they_are_called():
    sizes = {"B": 2, "T": 16, "R": 2, "H": 3, "K": 32}
    for name, entry in INPUTS.items():
        arrays = entry.arrays(np.random.default_rng(0), **sizes)
        cosine = np.einsum("btrhk,bsphk->bhtrsp", arrays["k"], arrays["k"])
        assert (cosine.min() > 0.9997) == ("identical" in name or "cosine" in name)
        assert (cosine.min() > 1 - 1e-12) == ("identical" in name)
        assert np.allclose(np.linalg.norm(arrays["k"], axis=-1), 1)
        assert (arrays["beta"].min() == 2) == ("beta 2" in name)
        strong = (arrays["g"] == -20).mean()
        assert strong == {"g = -20 everywhere": 1, "g = -20 at every 8th token": 1 / 8}.get(name, 0)
        assert entry.is_long == ("long" in name)
        assert not entry.decay or arrays["g"].max() <= 0
        assert (not arrays["g"].any()) == ("ungated" in name)
        assert entry.forgets != ("ungated" in name)


def row(dtype, chunked, recurrent=1e-7, name="random", plain=0.0):
    errors = {"recurrent": {"o": recurrent, "k": recurrent}, "chunked": chunked}
    return {
        "input": name,
        "dtype": dtype,
        "T": 8,
        "K": 4,
        "errors": errors,
        "plain_bfloat16": plain,
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("float32", {"o": 9e-6, "k": 2e-5}), {}),
        (("float32", {"o": 2e-5, "k": 2e-5}), {"o": 1e-5}),
        (("float32", {"o": 9e-6, "k": 4e-5}), {"k": 3e-5}),
        (("float32", {"o": 2e-5, "k": 4e-5}, 2e-6), {}),  # 30 times the recurrence
        (("float32", {"o": float("nan"), "k": 0.0}), {"o": 1e-5}),
        (("float64", {"o": 9e-14, "k": 2e-12}, 1e-16), {"k": 1e-12}),
        (("float16", {"o": 1.2e-3, "k": 3e-3}), {"k": 2.5e-3}),
        (("float16", {"o": 5.1e-3, "k": 9e-3}, 0.0, "beta 2, ungated", 1e-2), {"o": 5e-3}),
        (("bfloat16", {"o": 9e-3, "k": 3e-2}), {"k": 2e-2}),
        (("bfloat16", {"o": 9e-3, "k": 3e-2}, 0.0, "random", 1.0), {"k": 2e-2}),
        (("bfloat16", {"o": 2e-2, "k": 3e-2}, 0.0, "beta 2, ungated", 1e-2), {}),
        (("bfloat16", {"o": 5e-2, "k": 3e-2}, 0.0, "beta 2, ungated", 1e-2), {"o": 4e-2}),
        (("bfloat16", {"o": 2e-2, "k": 0.0}, 0.0, "beta 2, ungated", 1e-3), {"o": 1e-2}),
    ],
)
def test_bars(arguments, expected):
    over = over_the_bars(row(*arguments)).get("chunked", {})
    assert {name: bar for name, (_, bar) in over.items()} == pytest.approx(expected)


def test_the_table_marks_what_is_over_the_bars():
    rows = [row("float32", {"o": 2e-5, "g": 1e-6}), row("bfloat16", {"o": 1e-3, "k": 2e-3})]
    rows[0]["errors"]["recurrent"]["g"] = 1e-9
    text = op_accuracy.table(rows)
    of_o, of_gradients, of_g, *narrow = text.split("\n\n")
    assert of_o.endswith("| random | 8 | 4 | 1.0e-07 | **2.0e-05** |")
    assert of_gradients.endswith("| 1.0e-07 | 1.0e-06 |")
    assert of_g.endswith("| 1.0e-09 | 1.0e-06 |")
    assert [block.splitlines()[-1].split(" | ", 4)[4] for block in narrow[:3]] == [
        "1.0e-03 | 0.0e+00 |",
        "2.0e-03 |",
        "- |",
    ]
    assert text.endswith("- random, chunked float32: o 2.0e-05 (1.0e-05)")
    assert op_accuracy.table(rows[1:]).endswith("- nothing")


@pytest.mark.slow
def test_accuracy_writes_table_and_json(tmp_path, capsys):
    op_accuracy.command([f"--workdir={tmp_path}", *TINY])
    printed = capsys.readouterr().out
    assert (tmp_path / "accuracy.md").read_text().strip() == printed.strip()
    record = json.loads((tmp_path / "accuracy.json").read_text())
    cases = {(entry["input"], entry["dtype"]) for entry in record["rows"]}
    assert cases == {(name, dtype) for name in INPUTS for dtype in ("float32", "bfloat16")}
    for entry in record["rows"]:
        of_chunked, of_recurrence = (entry["errors"][n] for n in ("chunked", "recurrent"))
        assert set(of_chunked) - {"g"} == {"o", "final_state", "q", "k", "v", "beta"}
        assert ("g" in of_chunked) != ("ungated" in entry["input"])
        if entry["dtype"] == "float32":
            assert max(of_recurrence.values()) < 1e-5
            assert 0 < max(of_chunked.values()) < 1e-4
            assert max(entry["errors"]["chunked_as_gpu"].values()) < 1e-4
        else:  # the recurrence rounds its results alone
            assert 1e-4 < of_recurrence["o"] < 4e-3 < 10 * of_chunked["o"]
            assert of_recurrence["final_state"] < 1e-5
            assert of_chunked["final_state"] < 1e-4  # products in float32, as a CPU makes them
            for name in ("chunked_as_gpu", "chunked_as_tpu"):
                elsewhere = entry["errors"][name]
                assert elsewhere.keys() == of_chunked.keys()
                assert 1e-4 < elsewhere["final_state"] < 0.1
        assert f"| {entry['input']} | 9 | 4 | " in printed


@pytest.mark.slow
def test_full_precision_rounds_no_operand(tmp_path):
    arguments = [f"--workdir={tmp_path}", *TINY, "--dtypes=bfloat16"]
    arguments += ["--implementations=recurrent,chunked_as_gpu"]
    worst = {}
    for precision in ("default", "highest"):
        op_accuracy.command([*arguments, f"--precision={precision}"])
        rows = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
        worst[precision] = max(r["errors"]["chunked_as_gpu"]["final_state"] for r in rows)
    assert worst["highest"] < 1e-4 < 1e-3 < worst["default"]


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--implementations=chunked", "lacks 'recurrent', which the bars refer to"),
        ("--implementations=recurrent,fast", "implementations='fast' is not known"),
        ("--peer=fast", "peer='fast' is not known"),
        ("--peer=ejkernel", "peer=ejkernel needs the package ejkernel"),
        ("--dtypes=float8", "dtypes='float8' is not known"),
        ("--head_dim=1", "head_dim=1 is too small"),
        ("--chunk_size=0", "chunk_size=0 is too small"),
        ("--precision=best", "precision='best' is not known"),
        ("--seed=-1", "seed=-1 is too small"),
    ],
)
def test_errors_of_the_accuracy_table(argument, text, tmp_path, capsys):
    assert flags.run(op_accuracy.command, [f"--workdir={tmp_path}", argument]) != 0
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
