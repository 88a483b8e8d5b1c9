"""Sources that change while they are prepared, and folders whose parts do not fit each other."""

import contextlib
import dataclasses
import json
import os

import pytest

from deltaproduct_jax.data import preparation as module
from deltaproduct_jax.data.config import PrepareConfig
from deltaproduct_jax.data.corpus import open_corpus
from deltaproduct_jax.data.preparation import prepare
from deltaproduct_jax.data.tokenizer import train_bpe
from deltaproduct_jax.errors import ConfigError, RunDirectoryError


def config_of(source, tokenizer="bytes"):
    return PrepareConfig(sources=(str(source),), pattern=("*.txt",), tokenizer=tokenizer, workers=1)


def test_a_source_that_changes_while_it_is_prepared_is_refused(tmp_path, monkeypatch):
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("as it was hashed")
    other.write_text("as it stays")
    work = module._work

    def late(change):
        monkeypatch.setattr(module, "_work", lambda *given: (change(), work(*given))[1])
        return prepare(config_of(tmp_path), tmp_path / change.__name__)

    def touched():
        os.utime(other, (1, 1))

    def grown():
        path.write_text("as it was hashed, and more")

    def gone():
        other.unlink()

    assert late(touched)["counts"]["documents"] == 2
    with pytest.raises(RunDirectoryError, match=r"a\.txt has changed while it was prepared; give"):
        late(grown)
    assert not (tmp_path / "grown" / "manifest.json").exists()
    with pytest.raises(RunDirectoryError, match=r"was begun from other sources, or they have"):
        prepare(config_of(tmp_path), tmp_path / "grown")
    with pytest.raises(RunDirectoryError, match=r"b\.txt cannot be read: No such file"):
        late(gone)


@pytest.mark.parametrize("is_done", [True, False])
def test_a_tokenizer_whose_file_changes_makes_no_mixture(is_done, tmp_path, monkeypatch):
    """Its ids mean something else, and each piece would have them by the file of its time."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number} of some words " * 9)
    file, out = tmp_path / "tokenizer.json", tmp_path / "out"
    first, other = (train_bpe(["some of the words"] * 9, size).data for size in (259, 261))
    config = dataclasses.replace(config_of(tmp_path, str(file)), shard_bytes=1)
    file.write_bytes(first)
    with monkeypatch.context() as patch:
        if not is_done:
            patch.setattr(module, "_manifest", killed)
        with contextlib.suppress(KeyboardInterrupt):
            prepare(config, out)
    file.write_bytes(other)
    said = "prepared" if is_done else "begun"
    says = rf"was {said} with tokenizer='.*\.json', a file that has changed since; give another"
    kept = (out / "tokenizer.json").read_bytes()
    with pytest.raises(RunDirectoryError, match=says):
        prepare(config, out)
    assert (out / "tokenizer.json").read_bytes() == kept == first
    file.write_bytes(first)
    assert prepare(config, out)["tokenizer"]["vocab_size"] == 259
    file.unlink()
    if is_done:  # what is done needs it no more
        assert prepare(config, out)["counts"]["documents"] == 3


def killed(*_):
    raise KeyboardInterrupt


def test_sources_that_cannot_be_read_leave_nothing_behind(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for tokenizer in ("bytes", "bpe"):
        config = config_of(tmp_path / "a.parquet", tokenizer)
        with pytest.raises(ConfigError, match="cannot be read as Parquet"):
            prepare(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of two documents."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in "ab":
        (folder / f"{name}.txt").write_text(name * 20)
    prepare(config_of(folder), folder / "tokens")
    return folder / "tokens"


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("splits", "train", "shards"), [], r"splits\.train\.shards is empty; it must have one"),
        (
            ("splits", "train", "tokens"),
            9,
            r"splits\.train\.tokens=9 must be what its shards have, 4",
        ),
        (("splits", "train", "bytes"), -1, r"splits\.train\.bytes=-1 must be what its shards have"),
        (("tokenizer", "bos_id"), 999, r"tokenizer\.bos_id=999 must be below vocab_size=257"),
        (("dtype",), "uint8", "train-00000 is not what manifest.json says"),
        *[
            (
                ("splits", "train", "shards", 0, "name"),
                name,
                r"shards\[0\]\.name=.* is no name of a",
            )
            for name in ("../train-00000", "/train-00000", "..", "", "a\0b", "a\\b")
        ],
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(place, value, says, prepared, tmp_path):
    for file in prepared.glob("train*"):
        (tmp_path / file.name).symlink_to(file)
    content = inside = json.loads((prepared / "manifest.json").read_text())
    for key in place[:-1]:
        inside = inside[key]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert open_corpus(tmp_path, "train").num_tokens == 42
    with pytest.raises(ConfigError, match=r"no split 'test'; .*; a larger test_fraction or test_p"):
        open_corpus(tmp_path, "test")
    inside[place[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(RunDirectoryError, match=says):
        open_corpus(tmp_path, "train")
