"""Speed against a chip's peak, and the part of the time that was not lost, worked out by hand."""

import pytest

from deltaproduct_jax.training.measuring.throughput import (
    Goodput,
    Throughput,
    in_words,
    peak_of,
    training_seconds,
)

# 100 tokens in 10 s, then 300 in 10 s, the second after a pause of 80 s.
ROWS = [
    {"step": 2, "tokens": 100, "tokens_per_second": 10.0, "time": 1030.0},
    {"step": 6, "tokens": 400, "tokens_per_second": 30.0, "time": 1120.0},
]
STARTS = [{"time": "1970-01-01T00:16:40Z"}, {"time": "1970-01-01T00:18:30Z"}]  # 1000 s, 1110 s


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("cpu", None),
        ("TPU v99", None),
    ],
)
def test_peaks_of_chips(kind, peak):
    assert peak_of(kind) == peak


def test_columns_of_a_row():
    one = Throughput(devices=1, device_kind="cpu", parameters=7)
    assert one.columns(100.0) == {}  # the tokens per second of one device are in the row already
    many = Throughput(devices=4, device_kind="TPU v4", parameters=10**9)
    columns = many.columns(4 * 275e12 / 6e9 / 2)
    assert columns["tokens_per_second_per_device"] == pytest.approx(275e12 / 6e9 / 2)
    assert columns["mfu"] == pytest.approx(0.5)


def test_goodput_counts_steps_and_all_the_time_since_the_first_start():
    assert training_seconds(ROWS) == pytest.approx(20)
    goodput = Goodput(ROWS[:1], STARTS)
    assert goodput.until(1030.0) == pytest.approx(10 / 30)
    goodput.add(ROWS[1])
    assert goodput.until(1120.0) == pytest.approx(20 / 120)
    assert goodput.until(1200.0) == pytest.approx(20 / 200)
    # One of the two steps of the first row changed nothing, and one of the four of the second.
    skipping = [ROWS[0] | {"skipped_steps": 1}, ROWS[1] | {"skipped_steps": 2}]
    assert Goodput(skipping, STARTS).until(1200.0) == pytest.approx((5 + 7.5) / 200)


@pytest.mark.parametrize("starts", [[], [{}], [{"time": "yesterday"}]])
def test_goodput_of_a_run_that_began_nobody_knows_when(starts):
    assert Goodput(ROWS, starts).until(1200.0) is None


def test_a_whole_run_as_results_have_it():
    unknown = Throughput(devices=2, device_kind="cpu", parameters=10)
    found = unknown.of_run(ROWS, STARTS, now=1120.0)
    assert found == {
        "devices": 2,
        "device_kind": "cpu",
        "tokens_per_second_per_device": pytest.approx(10),
        "mfu": None,
        "goodput": pytest.approx(20 / 120),
        "memory_peak_bytes": None,
    }
    assert in_words(found, skipped_steps=0) == (
        "2 devices (cpu): 10 tokens/s each, MFU not known, since the chip's peak is not, "
        "goodput 17%"
    )
    known = Throughput(devices=1, device_kind="TPU v4", parameters=10**9)
    rows = [ROWS[0] | {"memory_peak_bytes": 3 * 2**30}, ROWS[1] | {"memory_peak_bytes": 2**30}]
    found = known.of_run(rows, STARTS, now=1120.0)
    assert found["mfu"] == pytest.approx(6e9 * 20 / 275e12)
    assert in_words(found, skipped_steps=2) == (
        "1 device (TPU v4): 20 tokens/s each, MFU 0.0%, goodput 17%, memory peak 3.0 GiB, "
        "2 steps skipped"
    )
