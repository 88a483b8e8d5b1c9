"""The page: its examples run, one after another."""

import re
from pathlib import Path

import pytest

from deltaproduct_jax.models import generation

PAGE = Path(generation.__file__).with_name("README.md").read_text()


@pytest.mark.slow
def test_the_examples_run(capsys):
    names = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(example, names)
    assert len(names["texts"]) == 3
    assert "length" in capsys.readouterr().out
    prefix, whole = names["prefix"], names["whole"]
    assert whole.length == prefix.length + len(" and more") + 4
    forks = [piece.tokens for piece in names["last"][:3]]
    assert len({tuple(tokens) for tokens in forks}) > 1
