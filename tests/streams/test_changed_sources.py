"""Sources that change while they are prepared, or of which nothing can be read."""

import os

import pytest

from deltaproduct_jax.data import preparation as module
from deltaproduct_jax.data.config import PrepareConfig
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
