"""What readers see of numbers and commands: ticks, cells, times, names, and lines to be pasted."""

import csv
import io
import itertools
import re
import shlex
import statistics
import types

import pytest
from campaign.damage import cases
from hypothesis import assume, given
from hypothesis import strategies as st

from deltaproduct_jax.errors import ConfigError
from experiments.lib import run_records
from experiments.lib.bench import report
from experiments.lib.figures import curves, names, style, tables
from experiments.lib.matched_shapes import WAYS, Shape, sizes_of
from experiments.lib.sweeps import view

NUMBERS = st.floats(1e-12, 1e12) | st.integers(1, 10**7) | st.sampled_from([2e-4, 5e-4, 1.5e9])
UNITS = {"k": 1, "M": 2}


def read(tick, thousand):
    """The number that a tick shows."""
    if power := re.fullmatch(r"\$(-?)(?:([\d.]+)\\cdot )?10\^\{(-?\d+)\}\$", tick):
        return float(f"{power[1]}{power[2] or 1}e{power[3]}")
    digits, unit = re.fullmatch(r"(-?[\d.]+)([kM]?)", tick).groups()
    return float(digits) * thousand ** UNITS.get(unit, 0)


@cases(200)
@given(NUMBERS, st.sampled_from([1, -1]), st.sampled_from([1000, 1024]))
def test_a_tick_is_the_number_at_its_place(number, sign, thousand):
    tick = style.plain(sign * number, thousand)
    assert read(tick, thousand) == pytest.approx(sign * number, rel=1e-5)


def test_ticks_are_short():
    shown = [style.plain(n) for n in (0, 0.02, 1500, 20_000, 3e6, 1e-5, 2e-4, 1e10)]
    powers = ["$10^{-5}$", r"$2\cdot 10^{-4}$", "$10^{10}$"]
    assert shown == ["0", "0.02", "1500", "20k", "3M", *powers]
    assert [style.plain(n, 1024) for n in (512, 4096, 3 * 2**20)] == ["512", "4k", "3M"]


@cases(60)
@given(st.integers(0, 40), st.integers(1, 3000), st.booleans())
def test_marks_of_a_rough_series_are_among_its_points(index, count, log):
    places = style.marked(index, count, log=log)["markevery"]
    assert places == sorted(set(places))
    assert 0 <= places[0]
    assert places[-1] < count
    assert len(places) <= 8


@cases(60)
@given(st.integers(0, 10**6))
def test_a_clock_says_the_seconds(seconds):
    parts = [int(part) for part in view.clock(seconds).split(":")]
    assert len(parts) == (3 if seconds >= 3600 else 2)
    assert sum(part * 60**place for place, part in enumerate(reversed(parts))) == seconds
    assert all(part < 60 for part in parts[1:])


def test_a_clock_that_was_set_back_shows_no_time():
    assert view.clock(-5.0) == "0:00"


@cases(100)
@given(st.text("abcdef", max_size=40), st.integers(1, 45))
def test_a_name_loses_its_middle_and_keeps_its_ends(text, width):
    short = view.shortened(text, width)
    assert len(short) == min(len(text), width)
    if short != text and width >= 5:
        head, tail = short.split("..")
        assert text.startswith(head)
        assert text.endswith(tail)
        assert 0 <= len(tail) - len(head) <= 1


@cases(60)
@given(
    st.lists(
        st.tuples(st.text("ab=,", min_size=1, max_size=70), st.text("xy ", max_size=30)),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 160),
)
def test_a_table_of_runs_fits_its_terminal(cells, width):
    def entry(run, error):
        shown = dict.fromkeys(view.COLUMNS, "") | {"run": run, "state": "running", "error": error}
        return types.SimpleNamespace(cells=lambda: shown | {"step": "10/30", "time": "1:05"})

    lines = view.table([entry(*pair) for pair in cells], width)
    assert len(lines) == len(cells) + 1
    assert max(map(len, lines)) <= width
    assert all(line.split()[0] == "run"[: len(line.split()[0])] for line in lines[:1])


# What a shell takes apart, or takes for something else.
VALUES = st.text("ab 0=,;:'\"$`\\!-()*", max_size=24) | st.just("(a, b --c) --d=1 2")


@cases(80)
@given(st.lists(st.tuples(st.sampled_from(["workdir", "x_1"]), VALUES), max_size=9))
def test_a_command_can_be_pasted_whole_or_cut(flags):
    argv = [f"--{name}={value}" for name, value in flags]
    command = report.command_line("op.speed", argv)
    assert shlex.split(command)[3:] == argv
    block = report.command_block(command)
    if block.startswith("Command: `"):
        assert block == f"Command: `{command}`"
        assert len(block) <= report.MOST_COLUMNS
    else:
        lines = block.removeprefix("Command:\n\n```sh\n").removesuffix("\n```").splitlines()
        assert all(line.endswith(" \\") for line in lines[:-1])
        pasted = [shlex.split(line.removesuffix(" \\")) for line in lines]  # each is whole
        assert list(itertools.chain(*pasted))[3:] == argv


def test_an_item_of_a_list_keeps_within_its_lines():
    words = [f"word{n}" for n in range(60)]
    lines = report.listed(f"12. {' '.join(words)}").splitlines()
    assert max(map(len, lines)) <= report.MOST_COLUMNS
    assert lines[0].startswith("12. word0 ")
    assert all(line.startswith("    word") for line in lines[1:])
    assert " ".join(lines).split() == ["12.", *words]


def test_a_cell_shows_what_is_known():
    assert report.shown(None, ".1f") == "-"
    assert [report.shown(2.25, ".1f"), report.shown(0, ".1f"), report.shown("a")] == [
        "2.2", "0.0", "a",
    ]  # fmt: skip
    row = {"median_ms": 12.34567, "min_ms": 1e-5, "max_ms": 123456.0}
    assert report.times(row) == ["12.35", "1e-05", "1.235e+05"]


def test_what_was_measured_stays_when_the_next_case_fails(capsys):
    written = []

    def measured():
        yield [{"n": 1}]
        yield [{"n": 2}, {"n": 3}]
        raise ConfigError("out of memory")

    record = {"rows": []}
    table = lambda rows: f"{len(rows)} rows"
    with pytest.raises(ConfigError, match="out of memory"):
        report.collect(
            record, measured(), table, lambda record: written.append(len(record["rows"]))
        )
    assert written == [1, 3]
    assert capsys.readouterr().err == "1 rows\n2 rows\n"
    assert report.collect({"rows": []}, [], table, str) == ""
    assert report.collect({"rows": []}, [[1], [2]], table, lambda record: f"{record}") == (
        "{'rows': [1, 2]}"
    )


def record_of(seed, group, score):
    """A finished run; without a score its results have none of that name."""
    strict = {} if score is None else {"sequence_accuracy": score}
    entries = [{"length": 8, "strict": strict}, {"length": 4, "strict": {"sequence_accuracy": 1}}]
    settings = {"seed": seed, "group": group, "shuffle": True, "lengths": [4, 8], "limit": None}
    return run_records.Record(f"run{seed}", settings, {"test": entries})


METRIC = "strict.sequence_accuracy"
SCORES = st.lists(
    st.tuples(st.sampled_from(["S3", "A5"]), st.integers(1, 3), st.floats(0, 1)), min_size=1
)


@cases(60)
@given(SCORES, st.floats(0, 1))
def test_tables_hold_every_run_once(scores, threshold):
    records = [record_of(n, group, score) for n, (group, n, score) in enumerate(scores)]
    for record, (_, layers, _) in zip(records, scores, strict=True):
        record.settings["num_layers"] = layers
    arguments = (records, ["group"], "num_layers", METRIC, None)
    rows, escapes = tables.scores_table(*arguments), tables.escape_table(*arguments, threshold)
    for row, escaped in zip(rows, escapes, strict=True):
        assert row["group"] == escaped["group"]
        for layers in {layers for _, layers, _ in scores}:
            cell = [s for group, n, s in scores if (group, n) == (row["group"], layers)]
            assert row[f"{layers} runs"] == escaped[f"{layers} runs"] == len(cell)
            assert row[f"{layers} best"] == max(cell, default=None)
            assert row[f"{layers} median"] == (statistics.median(cell) if cell else None)
            assert escaped[f"{layers} escaped"] == sum(s >= threshold for s in cell)
    for text in (
        tables.scores_markdown(rows, ["group"]),
        tables.escape_markdown(escapes, ["group"]),
    ):
        lines = text.splitlines()
        assert len(lines) == 2 + len(rows)
        assert len({line.count("|") for line in lines}) == 1
    back = list(csv.DictReader(io.StringIO(tables.to_csv(rows))))
    assert [line["group"] for line in back] == [row["group"] for row in rows]


@cases(40)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=5), st.floats(0, 9))
def test_of_losses_the_least_is_best_and_what_is_below_escapes(losses, threshold):
    records = [record_of(seed, "S3", 0.5) for seed in range(len(losses))]
    for record, loss in zip(records, losses, strict=True):
        record.results["test"][0] |= {"loss": loss, "bits_per_byte": 2 * loss}
    arguments = records, ["num_layers"], "group", "loss", None
    for record in records:
        record.settings["num_layers"] = 1
    (row,), (escaped,) = tables.scores_table(*arguments), tables.escape_table(*arguments, threshold)
    assert (row["S3 best"], row["S3 median"]) == (min(losses), statistics.median(losses))
    assert escaped["S3 escaped"] == sum(loss <= threshold for loss in losses)
    (row,) = tables.scores_table(records, ["num_layers"], "group", "bits_per_byte", None)
    assert row["S3 best"] == 2 * min(losses)
    record = {"rows": [row], "by": ["num_layers"], "x": "group", "length": None}
    axes = curves.scores_of(record | {"metric": "bits_per_byte"}, style.Look()).axes[0]
    assert axes.get_xlim()[1] > row["S3 median"]


def test_a_column_is_of_one_length():
    records = [record_of(seed, "S3", 0.5) for seed in range(3)]
    records[2].results["test"].pop(0)  # up to 4 tokens alone
    for table in (tables.scores_table, lambda *given: tables.escape_table(*given, 0.5)):
        with pytest.raises(ConfigError, match="lengths, run2 to 4 and run1 to 8; give --length"):
            table(records, ["seed"], "group", METRIC, None)
        assert len(table(records, ["seed"], "group", METRIC, 4)) == 3
        records[2].settings["group"] = "A5"
        assert len(table(records, ["seed"], "group", METRIC, None)) == 3
        records[2].settings["group"] = "S3"


def test_cells_without_runs_are_dashes():
    records = [record_of(0, "S3", 0.5), record_of(1, "A5", 0.25)]
    records[1].settings["seed"] = 0
    rows = tables.scores_table(records, ["seed"], "group", METRIC, 8)
    assert tables.scores_markdown(rows, ["seed"]).splitlines()[2] == (
        "| 0 | 0.500 | 0.500 | 0.250 | 0.250 |"
    )
    rows = tables.scores_table(records, ["group"], "group", METRIC, 8)
    said = tables.scores_markdown(rows, ["group"])
    assert "| S3 | 0.500 | 0.500 | 1 | - | - | 0 |" in said
    escaped = tables.escape_table(records, ["group"], "group", METRIC, 8, 0.5)
    assert tables.escape_markdown(escaped, ["group"]).splitlines()[2:] == [
        "| S3 | 1/1 | - |", "| A5 | - | 0/1 |",
    ]  # fmt: skip


def test_settings_of_a_run_are_written_as_flags_are():
    record = record_of(3, "S3", 0.5)
    assert [record.value(key) for key in ("shuffle", "lengths", "limit", "seed")] == [
        "true", "4,8", "none", "3",
    ]  # fmt: skip
    assert record.entry(None)["length"] == 8
    assert record.score(METRIC, 4) == 1.0
    record.results["test"][0]["strict"]["whole"] = True  # no number to make a table of
    for metric in ("strict", "strict.whole", "strict.sequence_accuracy.x"):
        with pytest.raises(ConfigError, match=r"one of length, strict\.sequence_accuracy$"):
            record.score(metric, 8)
    empty = run_records.Record("r", {}, {"test": []})
    with pytest.raises(ConfigError, match="'seed' is no setting of run r; it has none"):
        empty.value("seed")
    with pytest.raises(ConfigError, match="the results of run r have no test lengths"):
        empty.entry(None)


@cases(60)
@given(st.lists(st.sampled_from(["10", "9", "-1", "0.5", "Z4", "S10", "none", "S3", "D3", "A5"])))
def test_groups_hold_every_run_in_a_sensible_order(values):
    records = [run_records.Record(str(n), {"key": v}, {}) for n, v in enumerate(values)]
    groups = run_records.grouped(records, ["key"])
    assert sorted(itertools.chain(*groups.values()), key=lambda r: int(r.name)) == records
    shown = [value for (value,) in groups]
    sizes = [float(value) for value in shown if value[0] in "-019"]
    texts = [value for value in values if value[0] in "ZD"]
    assert shown == [
        *(f"{size:g}" for size in sorted(sizes)),
        *(group for group in ("S3", "A5", "S10") if group in values),
        *dict.fromkeys(texts),
        *["none"] * ("none" in values),
    ]


def test_a_label_of_no_keys_is_of_all_runs():
    assert run_records.label([], ()) == "all runs"
    assert run_records.label(["num_layers", "seed"], ("2", "0")) == "layers = 2, seed = 0"
    assert run_records.choose([record_of(0, "S3", 1)], "") == [record_of(0, "S3", 1)]


PARTS = ["n_h = 2", "group = S5", "mixer = gla", "mixer = mamba2", "hidden_size = 64", "S10"]


@cases(40)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4))
def test_a_pretty_label_is_that_of_its_parts(parts):
    assert names.pretty(", ".join(parts)) == ", ".join(map(names.pretty, parts))
    assert "_" not in re.sub(r"\$[^$]*\$", "", names.pretty(", ".join(parts)))


@cases(40)
@given(st.integers(1, 6), st.integers(1, 64), st.integers(1, 512), st.sampled_from(WAYS))
def test_shapes_of_more_factors_have_about_as_many_parameters(factors, heads, width, way):
    assume((heads if way == "heads" else width) >= 16)
    shape = Shape(1, heads, width).with_factors(factors, way)
    size = lambda s: (2 + 2 * s.num_householder) * s.num_heads * s.head_dim
    assert size(shape) == pytest.approx(size(Shape(1, heads, width)), rel=0.12)
    kept = "head_dim" if way == "heads" else "num_heads"
    assert getattr(shape, kept) == getattr(Shape(1, heads, width), kept)


@pytest.mark.parametrize("text", ["", "2x8", "2x8x0", "2x8x-1", "2x8x1.5", "٢x8x4", "2x8x128\n"])
def test_a_shape_that_is_none_names_its_flag(text):
    with pytest.raises(ConfigError, match=r"^first=.* must be 3 whole numbers, as in 2x8x128"):
        sizes_of("first", text, 3)
    assert sizes_of("first", "2x8x128", 3) == [2, 8, 128]
    assert Shape.of_text("first", "1x8x128") == Shape(1, 8, 128)
