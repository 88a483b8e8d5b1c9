"""Texts that are read: files of JSON, lines that a kill has torn, flags, and grids of settings.

What is written comes back as it was; whatever else stands there is read as what it says, or refused
in one line. Nothing here trains a model.
"""

import dataclasses
import json
import math
import tempfile
import typing
from pathlib import Path

import pytest
from campaign.damage import JUNK, NUMBERS, RAW, TEXTS, cases, changed, places
from hypothesis import given
from hypothesis import strategies as st

from deltaproduct_jax import files, strict_json
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.settings import misfit
from deltaproduct_jax.training.records import ConfigFile
from experiments import formal_languages, recall, state_tracking
from experiments.lib import flags
from experiments.lib.field_flags import options_of, show, value_of
from experiments.lib.sweeps import grid

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]

WORDS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=6)
NUMBERS_OF_JSON = st.one_of(
    st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False)
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS_OF_JSON, WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=12,
)


def depth(value):
    inside = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inside), default=0) if isinstance(value, dict | list) else 0


def refused(read, *, names=()):
    """What is read, or None after an error of ours of one line that has the names in it."""
    try:
        return read()
    except (ConfigError, RunDirectoryError) as error:
        text = str(error)
    assert "\n" not in text, text
    assert all(name in text for name in names), text
    return None


@cases(300)
@given(value=VALUES)
def test_what_is_written_comes_back(value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "value.json"
        files.write_file(path, strict_json.to_json(value))
        back = files.read_json(path)
        assert back == value
        assert json.dumps(back) == json.dumps(value)  # True is no 1, 1.0 no 1
        assert [p.name for p in Path(folder).iterdir()] == ["value.json"]


@cases(300)
@given(data=st.one_of(st.binary(max_size=40), st.sampled_from(RAW), WORDS.map(str.encode)))
def test_any_bytes_are_json_or_are_refused(data):
    """What is read is what Python's reader says, but for numbers and nesting that are refused."""
    value = refused(lambda: [strict_json.decode(data, typing.Any, "here")], names=["here"])
    if value is not None:
        assert value == [json.loads(data)]
        assert depth(value[0]) <= strict_json.DEEPEST


@cases(200)
@given(value=VALUES, data=st.data())
def test_a_schema_is_kept_or_the_place_is_named(value, data):
    """Of a file like config.json, changed in one place."""
    config = {"task": {"group": "S3"}, "model": {"hidden_size": 8}, "train": {"steps": 4}}
    path = data.draw(st.sampled_from(list(places(config))))
    new = data.draw(st.one_of(st.just(value), st.sampled_from(JUNK)))
    spoilt = changed(config, path, new)
    try:
        text = json.dumps(spoilt).encode()
    except UnicodeEncodeError:
        return
    read = refused(
        lambda: strict_json.decode(text, ConfigFile, "config.json"), names=["config.json"]
    )
    if read is not None:
        assert misfit(read, ConfigFile, "") is None
        assert read == json.loads(text)


@cases(200)
@given(rows=st.lists(st.dictionaries(WORDS, LEAVES, max_size=3), max_size=5), data=st.data())
def test_a_torn_file_of_lines_is_its_first_lines(rows, data):
    """Cut anywhere, as a kill does: the lines that are whole, and no error."""
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    whole = b"".join(lines)
    stop = data.draw(st.integers(0, len(whole)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(whole[:stop])
        found = files.read_lines(path)
        assert found == rows[: len(found)]
        assert len(found) == whole[:stop].count(b"\n")
        files.write_file(path, b"{", append=True)
        files.write_file(path, b"}\n", append=True)
        assert path.read_bytes() == whole[:stop] + b"{}\n"


FIELDS = sorted(
    {
        (name, annotation)
        for experiment in (state_tracking, recall, formal_languages)
        for section in experiment.SECTIONS.values()
        for name, annotation in typing.get_type_hints(section).items()
        if name in {field.name for field in dataclasses.fields(section)}
    },
    key=str,
)
ITEMS = {
    int: st.integers(-(10**12), 10**12),
    float: st.floats(allow_nan=False, allow_infinity=False),
    # A comma ends an item, and "none" is no text where a field may be empty.
    str: st.text(st.characters(blacklist_characters=",", blacklist_categories=["Cs"]), min_size=1),
    bool: st.booleans(),
}


def value_for(annotation):
    """A strategy for values of a field."""
    options = options_of(annotation)
    (kind,) = (option for option in options if option is not type(None))
    if typing.get_origin(kind) is tuple:
        values = st.lists(ITEMS[typing.get_args(kind)[0]], max_size=4).map(tuple)
    else:
        values = ITEMS[kind]
    return st.one_of(st.none(), values) if type(None) in options else values


@cases(400)
@given(data=st.data(), field=st.sampled_from(FIELDS))
def test_a_value_written_as_a_flag_is_that_value(data, field):
    name, annotation = field
    value = data.draw(value_for(annotation))
    if isinstance(value, str) and value.lower() == "none" and type(None) in options_of(annotation):
        return
    text = show(value)
    again = value_of(text, annotation)
    assert again == value, name
    assert type(again) is type(value)
    assert misfit(again, annotation, name) is None


@cases(300)
@given(field=st.sampled_from(FIELDS), text=st.one_of(st.sampled_from(NUMBERS + TEXTS), WORDS))
def test_any_text_of_a_flag_is_a_value_or_says_what_it_may_be(field, text):
    name, annotation = field
    try:
        value = value_of(text, annotation)
    except ValueError as error:
        said = str(error)
        assert said.startswith("it must be "), name
        assert "\n" not in said
        return
    kinds = [option for option in options_of(annotation) if option is not type(None)]
    if value is not None and typing.get_origin(kinds[0]) is None:
        assert type(value) is kinds[0]


KEYS = {"seed": "0:3", "steps": "10,20,40", "batch_size": "8", "learning_rate": "0.1,0.01"}


@cases(150)
@given(data=st.data(), keys=st.lists(st.sampled_from(sorted(KEYS)), unique=True, min_size=1))
def test_a_grid_makes_the_runs_that_were_counted(data, keys):
    """Every combination once; a limit is kept before a run is made."""
    text = ";".join(f"{key}={KEYS[key]}" for key in keys)
    parsed = grid.parse_grid("--grid", text)
    assert list(parsed) == keys
    count = math.prod(map(len, parsed.values()))
    most = data.draw(st.integers(1, 40))
    fixed = "warmup_steps=0;train_length=4;eval_lengths=8;curriculum="
    made = refused(lambda: grid.expand("state_tracking", [text], fixed, most), names=["--grid"])
    if count > most:
        assert made is None
        return
    assert len(made) == count
    assert len({grid.identity(run.config) for run in made}) == count
    twice = grid.expand("state_tracking", [text, text], fixed, 2 * most)
    assert len(twice) == count  # each configuration once


@cases(200)
@given(text=st.one_of(st.text("seed=:;,()0123. ", max_size=16), WORDS))
def test_any_text_of_a_grid_is_read_or_refused(text):
    parsed = refused(lambda: grid.parse_grid("--grid", text, 100), names=["--grid"])
    if parsed:
        assert all(key and 1 <= len(values) <= 100 for key, values in parsed.items())
        fixed = refused(lambda: grid.parse_fixed(text))
        assert fixed is None or fixed.keys() == parsed.keys()


@cases(150)
@given(data=st.data())
def test_a_configuration_that_is_saved_is_given_again(data):
    """Flags to a configuration, that to a file, and the file to the same configuration."""
    experiment = data.draw(st.sampled_from([state_tracking, recall, formal_languages])).EXPERIMENT
    numbers = {"hidden_size": st.integers(1, 64), "seed": st.integers(0, 99)}
    numbers |= {"learning_rate": st.floats(1e-6, 1.0), "weight_decay": st.floats(0, 1.0)}
    chosen = {name: data.draw(values) for name, values in numbers.items()}
    argv = [f"--{name}={show(value)}" for name, value in chosen.items()]

    def parse(*argv):
        return flags.parse(["--workdir=.", *argv], experiment.sections, experiment.presets)

    first = parse(*argv).sections
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        saved = {section: dict(values) for section, values in first.items()}
        path.write_bytes(strict_json.to_json(saved))
        second = parse(f"--config={path}").sections
    assert json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    for name, value in chosen.items():
        assert any(values.get(name) == value for values in second.values()), name
