"""Values of settings: which are right, what is said of others, and what records have of them."""

import dataclasses
from typing import Any, NamedTuple, NotRequired, TypedDict

import pytest
from campaign.damage import cases
from hypothesis import given
from hypothesis import strategies as st

from deltaproduct_jax import errors, settings
from deltaproduct_jax.errors import ConfigError


class Pair(NamedTuple):
    """A value of its own, of whose parts no bound says anything."""

    number: int


@dataclasses.dataclass(frozen=True)
class Example:
    """A configuration with a field of every kind of bound."""

    steps: int = settings.setting(3, "steps", least=1, most=9)
    rate: float = settings.setting(0.5, "learning rate", above=0)
    names: tuple[str, ...] = settings.setting(("a",), "names of things", filled=True)
    late: int | None = settings.setting(None, "a later field", recorded_if_set=True)
    sizes: tuple[int, ...] = settings.setting((4,), "sizes", least=2, most=9)
    kinds: tuple[str, ...] | None = settings.setting(None, "kinds", one_of={"a": 1, "b": 2})
    kind: str | None = settings.setting("a", "a kind", one_of=("a", "b"))
    pair: tuple | None = settings.setting(None, "a pair")
    seed: int = settings.seed_setting("of all")

    def __post_init__(self):
        settings.check_fields(self)


@cases(60)
@given(st.integers(0, 10**18 - 1))
def test_plain_digits_are_a_whole_number(number):
    assert settings.whole_number(str(number)) == number


@cases(200)
@given(st.text("0123456789-+ _.e²٣\n", max_size=6))
def test_no_other_text_is_a_whole_number(text):
    found = settings.whole_number(text)
    assert found is None or (text.isascii() and text.isdecimal() and found == int(text))


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1\n", "1_0", "²", "٣", "1.0", "9" * 5000])
def test_what_int_would_take_or_die_of_is_no_whole_number(text):
    assert settings.whole_number(text) is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 0}, "steps=0 is too small; it must be at least 1"),
        ({"steps": 10}, "steps=10 is too large; it may be up to 9"),
        ({"steps": True}, "steps=True must be a whole number"),
        ({"steps": 2.0}, r"steps=2\.0 must be a whole number"),
        ({"rate": 0}, r"rate=0\.0 must be greater than 0"),
        ({"rate": float("nan")}, "rate=nan must be a finite number"),
        ({"rate": 10**400}, "rate=1000.*must be a finite number"),
        ({"names": ()}, r"names is empty; give one entry at least \(names of things\)"),
        ({"names": ("a", 1)}, r"names\[1\]=1 must be a text"),
        ({"names": "ab"}, "names='ab' must be texts"),
        ({"late": "none"}, "late='none' must be a whole number or none"),
        ({"late": 2**63}, "late=9223372036854775808 is too large"),
        ({"sizes": (4, 1)}, "sizes=1 is too small; it must be at least 2"),
        ({"sizes": [10]}, "sizes=10 is too large; it may be up to 9"),
        ({"kinds": ("b", "c")}, r"kinds='c' is not known; it may be one of \['a', 'b'\]"),
        ({"kind": "c"}, r"kind='c' is not known; it may be one of \['a', 'b'\]"),
        ({"seed": -1}, "seed=-1 is too small; it must be at least 0"),
        ({"seed": 2**63}, "seed=.* is too large"),
    ],
)
def test_a_field_says_what_it_may_be(fields, says):
    with pytest.raises(ConfigError, match=says):
        Example(**fields)


def test_bounds_themselves_are_allowed():
    for fields in (
        {"steps": 1},
        {"steps": 9},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"rate": 2.0**-126},
        {"sizes": (2, 9)},
        {"sizes": ()},
        {"kinds": ("a", "b"), "kind": None},
        {"pair": Pair(2**64)},
    ):
        Example(**fields)


def test_a_record_leaves_out_what_is_younger_and_not_set():
    kept = settings.recorded(Example(sizes=(2,)))
    assert kept["sizes"] == (2,)
    assert "late" not in kept
    assert settings.recorded(Example(late=4))["late"] == 4


class Inner(TypedDict):
    """An entry of a file."""

    length: int
    score: NotRequired[float | None]


@pytest.mark.parametrize(
    ("value", "annotation", "says"),
    [
        ({"length": 3}, Inner, None),
        ({"length": 3, "score": None, "more": object()}, Inner, None),
        ({}, Inner, "x.length is missing"),
        ({"length": 3, "score": "a"}, Inner, "x.score='a' must be a finite number or none"),
        ([{"length": 1}, {"length": "2"}], list[Inner], "x[1].length='2' must be a whole number"),
        ({"a": [1, None]}, dict[str, list[int]], "x.a[1]=None must be a whole number"),
        ({"a\nb": None}, dict[str, int], r"x.'a\nb'=None must be a whole number"),
        ([1], dict[str, int], "x=[1] must be an object of keys and values"),
        # Of a union the kind with parts says more than that it is none of them.
        ({"length": "2"}, Inner | None, "x.length='2' must be a whole number"),
        (7, Inner | None, "x=7 must be an object of keys and values or none"),
        (7, list[int] | tuple[str, ...], "x=7 must be a list or texts"),
        (object, Any, None),
    ],
)
def test_the_place_of_what_does_not_fit_is_named(value, annotation, says):
    assert settings.misfit(value, annotation, "x") == says


@pytest.mark.parametrize("kind", [ConfigError, errors.RunDirectoryError])
@pytest.mark.parametrize("text", ["a\nb", " a \r\n\n\t b\n", "a\u2028b", "a\x85b"])
def test_an_error_is_of_one_line(kind, text):
    assert str(kind(text)) == "a b"
    assert str(kind("two  spaces, \ttab")) == "two  spaces, \ttab"


def test_values_are_shown_in_one_short_line():
    assert settings.shown("a\nb") == r"'a\nb'"
    assert settings.shown("a" * 100) == "'" + "a" * (settings.SHOWN - 1) + "..."
    assert settings.shown([10**5000]) == "(a number of thousands of digits)"


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        (int | None, "a whole number or none"),
        (tuple[int, ...], "whole numbers such as 4,8,16"),
        (tuple[float, ...], "numbers such as .7,.3"),
        (list[str], "a list"),
        (dict[str, int], "an object of keys and values"),
        (Inner, "an object of keys and values"),
    ],
)
def test_annotations_in_words(annotation, says):
    assert settings.spell(annotation) == says


@pytest.mark.parametrize(
    ("check", "arguments", "says"),
    [
        (
            errors.require_one_of,
            ("x", "c", "ab"),
            r"x='c' is not known; it may be one of \['a', 'b",
        ),
        (errors.require_at_least, ("x", 1, 2), "x=1 is too small; it must be at least 2"),
        (errors.require_at_least, ("x", float("nan"), 0), "x=nan is too small"),
        (errors.require_ascending, ("x", ()), r"x=\(\) must ascend, with one length at least"),
        (errors.require_ascending, ("x", (4, 4)), r"x=\(4, 4\) must ascend"),
        (errors.require_ascending, ("x", (8, 4)), r"x=\(8, 4\) must ascend"),
    ],
)
def test_what_is_required_is_said(check, arguments, says):
    with pytest.raises(ConfigError, match=says):
        check(*arguments)


def test_what_is_kept_passes():
    errors.require_one_of("x", None, [None, "a"])
    errors.require_at_least("x", 2, 2)
    errors.require_ascending("x", (4, 8, 16))


def test_a_name_is_given_once_but_to_a_class_that_is_loaded_again():
    def made(name):
        return type(name, (), {"__module__": "plugins", "__qualname__": name})

    errors.refuse_taken("mixer", "own", made("Own"), None)
    errors.refuse_taken("mixer", "own", made("Own"), made("Own"))
    with pytest.raises(
        ConfigError, match=r"^mixer='own' is taken by plugins\.Own; give plugins\.X"
    ):
        errors.refuse_taken("mixer", "own", made("X"), made("Own"))


@pytest.mark.parametrize("name", ["", "a..b", "a-b", ".json", "json.no", "no_module_of_this_name"])
def test_what_is_no_module_is_not_found(name):
    assert errors.found_module("json.decoder").__name__ == "json.decoder"
    assert errors.found_module(name) is None


def test_a_module_that_lacks_another_says_so(tmp_path, monkeypatch):
    (tmp_path / "lacking_one.py").write_text("import no_module_of_this_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_module_of_this_name"):
        errors.found_module("lacking_one")
