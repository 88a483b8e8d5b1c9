"""Sources that change while they are prepared, and folders whose parts do not fit each other."""

import json
import os

import pytest

from deltaproduct_jax.data import preparation as module
from deltaproduct_jax.data.config import PrepareConfig
from deltaproduct_jax.data.corpus import open_corpus
from deltaproduct_jax.data.preparation import prepare
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
