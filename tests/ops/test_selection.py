"""The tables of IMPLEMENTATIONS.md against what they describe."""

import itertools
import operator
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax import ops
from deltaproduct_jax.ops import kernels, select_implementation
from deltaproduct_jax.ops.convolution.plain import Form
from deltaproduct_jax.ops.convolution.selection import reason_against, select_convolution
from deltaproduct_jax.ops.selection import AVAILABLE, PLATFORMS

PAGE = Path(ops.__file__).parent / "IMPLEMENTATIONS.md"
OPERATORS = {"=": operator.eq, ">": operator.gt, "<": operator.lt}
OPERATORS |= {">=": operator.ge, "<=": operator.le}
VALUES = {
    "T": lambda s: s["T"],
    "R": lambda s: s["R"],
    "K, V": lambda s: min(s["K"], s["V"]),
    "K V": lambda s: s["K"] * s["V"],
    "B Hv": lambda s: s["B"] * s["Hv"],
}
COLUMNS = ("tokens", "factors", "state", "states")
WIDTHS = [(8, 64), (16, 16), (16, 17), (32, 32), (32, 33), (64, 64), (64, 128), (128, 128)]
WIDTHS += [(256, 256)]


def table(title):
    """The rows of the table under a heading, by the names of their columns."""
    text = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def holds(cell, sizes):
    if cell == "any":
        return True
    name, comparison, number = re.fullmatch(r"(.+?) (>=|<=|=|>|<) (\d+)", cell).groups()
    return OPERATORS[comparison](VALUES[name](sizes), int(number))


def by_the_page(rows, platform, differentiated, sizes, *, has_kernels):
    """What the first row that applies says."""
    for row in rows:
        if (
            row["platform"] in ("any", platform)
            and row["gradient"] in ("any", "yes" if differentiated else "no")
            and all(holds(row[column], sizes) for column in COLUMNS)
            and (has_kernels or row["runs"] not in kernels.KERNELS)
        ):
            return row["runs"]
    raise AssertionError("no row applies")


@pytest.mark.parametrize("has_kernels", [True, False])
def test_the_rule_is_the_one_of_the_page(has_kernels, monkeypatch):
    monkeypatch.setattr(kernels, "is_installed", lambda name: True)
    for name in kernels.KERNELS:
        monkeypatch.setattr(kernels.load(name), "is_ready", lambda: has_kernels)
    picked, rows = set(), table("The rule")
    for platform, differentiated, B, T, R, (K, V) in itertools.product(
        PLATFORMS, (True, False), (7, 8), (1, 2, 4096), (1, 2, 4), WIDTHS
    ):
        sizes = {"B": B, "T": T, "R": R, "Hv": 2, "K": K, "V": V}
        expected = by_the_page(rows, platform, differentiated, sizes, has_kernels=has_kernels)
        got = select_implementation(
            platform, **sizes, differentiated=differentiated, dtype="bfloat16"
        )
        assert got == expected, (platform, differentiated, sizes)
        picked.add(got)
    assert picked == {"chunked", "recurrent"} | (set(kernels.KERNELS) if has_kernels else set())


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_the_rules_take_numbers_of_numpy(kind, monkeypatch):
    """Products of narrow ones overflow, and none of them is an int, as a size that is known is."""
    monkeypatch.setattr(kernels, "is_installed", lambda name: True)
    for name in kernels.KERNELS:
        monkeypatch.setattr(kernels.load(name), "is_ready", lambda: True)
    sizes = {"B": 100, "T": 100, "R": 3, "Hv": 64, "K": 64, "V": 127}
    theirs = {name: kind(size) for name, size in sizes.items()}
    for platform, differentiated in itertools.product(PLATFORMS, (True, False)):
        want = select_implementation(platform, **sizes, differentiated=differentiated)
        assert select_implementation(platform, **theirs, differentiated=differentiated) == want
    lengths = {name: theirs[name] for name in ("T", "R", "K", "V")}
    assert type(ops.default_chunk_size("tpu", "bfloat16", **lengths)) is int
    lengths = {"B": kind(100), "T": kind(100), "C": kind(128), "head_width": 64}
    assert select_convolution("cuda", op="triton", **lengths) == "triton"


def test_kernels_take_what_the_page_says(monkeypatch):
    monkeypatch.setattr(kernels, "is_installed", lambda name: True)
    rows = {row["kernel"]: row for row in table("What kernels take")}
    assert set(rows) == set(kernels.KERNELS)
    base = {"B": 1, "T": 64, "R": 1, "H": 1, "Hv": 1, "K": 64, "V": 64, "precision": None}

    def takes(name, dtype="float32", **changes):
        sizes = base | changes
        return kernels.reason_against(name, **sizes, dtype=jnp.dtype(dtype)) is None

    for name, row in rows.items():
        assert row["platform"] == kernels.KERNELS[name].platform
        for column in ("R", "K", "V"):
            most = int(row[f"{column} at most"])
            assert takes(name, **{column: most})
            assert not takes(name, **{column: most + 1})
        for dtype in ("bfloat16", "float16", "float32", "float64"):
            assert takes(name, dtype) == (dtype in row["dtypes"].split(", "))


@pytest.mark.parametrize("has_kernels", [True, False])
def test_the_rule_of_convolutions_is_the_one_of_the_page(has_kernels, monkeypatch):
    monkeypatch.setattr(kernels, "is_installed", lambda name: True)
    for name in kernels.KERNELS:
        monkeypatch.setattr(kernels.load(name), "is_ready", lambda: has_kernels)
    picked, rows = set(), table("Short convolutions")
    for platform, op, T, width in itertools.product(
        PLATFORMS, AVAILABLE, (1, 2, 4096), (64, 128, 192, 256)
    ):
        expected = next(
            row["runs"]
            for row in rows
            if row["platform"] in ("any", platform)
            and row["op in a gradient"] in ("any", op)
            and holds(row["tokens"], {"T": T})
            and _is_multiple(row["width of heads"], width)
            and (has_kernels or row["runs"] == "plain")
        )
        sizes = {"B": 2, "T": T, "C": 2 * width, "head_width": width}
        got = select_convolution(platform, op=op, **sizes)
        assert got == expected, (platform, op, T, width)
        picked.add(got)
    assert picked == {"plain"} | ({"pallas_tpu", "triton"} if has_kernels else set())


def _is_multiple(cell, width):
    return cell == "any" or width % int(cell.removeprefix("K, V multiples of ")) == 0


def test_kernels_of_convolutions_take_what_the_page_says(monkeypatch):
    monkeypatch.setattr(kernels, "is_installed", lambda name: True)
    rows = {row["kernel"]: row for row in table("What kernels of convolutions take")}
    assert set(rows) == set(kernels.KERNELS)

    def takes(name, dtype="float32", conv_size=2, C=128):
        sizes = {"B": 1, "T": 64, "C": C, "conv_size": conv_size, "dtype": jnp.dtype(dtype)}
        return reason_against(name, Form(jax.nn.silu), **sizes) is None

    for name, row in rows.items():
        most, multiple = int(row["taps at most"]), int(row["multiples of"].split()[0])
        assert takes(name, conv_size=most)
        assert not takes(name, conv_size=most + 1)
        assert not takes(name, conv_size=1)
        assert takes(name, C=3 * multiple)
        assert takes(name, C=3 * multiple + 1) == (multiple == 1)
        for dtype in ("bfloat16", "float16", "float32", "float64"):
            assert takes(name, dtype) == (dtype in row["dtypes"].split(", "))


def test_every_implementation_has_its_row():
    assert {row["name"] for row in table("Names")} == set(AVAILABLE)
