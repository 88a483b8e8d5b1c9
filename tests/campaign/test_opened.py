"""What others open, damaged at random: prepared text, finished runs, and models of other projects.

Each case ends well, or in one error of ours that names something of the folder; nothing in it is
touched. What is opened in spite of damage is whole: ids of the vocabulary, finite parameters.
"""

import contextlib
import json
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from campaign.damage import cases, damage, files, files_in
from hypothesis import given
from hypothesis import strategies as st
from interop.golden_models import FOLDERS
from tiny_run import TinyModel, run_config

from deltaproduct_jax import load_run
from deltaproduct_jax.data import PrepareConfig, StreamConfig, TokenStream, open_corpus, prepare
from deltaproduct_jax.data.tokenizer import tokenizer_of
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.interop import fla
from deltaproduct_jax.training import loop, runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]

REFUSALS = (ConfigError, RunDirectoryError)


def said(open_it, folder):
    """What opening gives, or None after one line that names the folder or something in it."""
    try:
        return open_it()
    except REFUSALS as error:
        text = str(error)
        assert text
        assert "\n" not in text, text
        assert "Traceback" not in text
        assert folder.name in text or any(path.name in text for path in folder.rglob("*")), text
        return None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Text of bytes in several shards."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    texts = ["".join(draw.choices("abc xyz", k=draw.randint(1, 90))) for _ in range(120)]
    path = folder / "source.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = PrepareConfig(
        sources=(str(path),), tokenizer="bytes", shard_bytes=2000, workers=1, valid_fraction=0.2
    )
    prepare(config, folder / "tokens")
    return folder / "tokens"


@contextlib.contextmanager
def damaged(data, whole, pattern="*"):
    """A copy of a folder with one or two files damaged, which no one else may change."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(whole, Path(place) / "folder"))
        for _ in range(data.draw(st.integers(1, 2))):
            if there := files(copy, pattern):
                damage(data, data.draw(st.sampled_from(there)))
        before = files_in(copy)
        yield copy
        assert files_in(copy) == before


@cases(200)
@given(data=st.data())
def test_prepared_text(prepared, data):
    """A stream reads rows of ids that its tokenizer knows, or names a file and what is wrong."""
    with damaged(data, prepared) as folder:
        packing = data.draw(st.sampled_from(["concatenate", "first_fit"]))
        config = StreamConfig((str(folder),), packing=packing)

        def read():
            stream = TokenStream(config, "train", batch_size=4, length=16, seed=0)
            return [stream.batch(step) for step in (0, 1, 10**6)]

        batches = said(read, folder)
        tokenizer = said(lambda: tokenizer_of(folder), folder)
        for split in ("train", "valid"):
            corpus = said(lambda split=split: open_corpus(folder, split), folder)
            if corpus is not None:
                number = data.draw(st.integers(0, len(corpus.offsets) - 2))
                said(lambda c=corpus, n=number: c.document(n), folder)
        if batches is not None and tokenizer is not None:
            for rows in batches:
                assert 0 <= rows.inputs.min()
                assert rows.inputs.max() < tokenizer.vocab_size


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of a model that compiles at once."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SequenceModel", TinyModel)
        patch.setattr(runs, "SequenceModel", TinyModel)
        loop.train(run_config(), workdir, ["test"])
        yield workdir


@cases(200)
@given(data=st.data())
def test_finished_runs(trained, data):
    """A checkpoint that is opened has finite numbers of the right shapes."""
    with damaged(data, trained) as folder:
        which = data.draw(st.sampled_from(["best", "newest", 12, 7, "middle", True, 4.0, -1]))
        opened = said(lambda: load_run(folder, which), folder)
        if opened is not None:
            assert opened.step in (4, 8, 12)
            embedding = np.asarray(opened.model.embeddings.embedding[...])
            assert embedding.shape == (opened.config.model.vocab_size, 8)
            assert np.isfinite(embedding).all()


@cases(150)
@given(data=st.data(), name=st.sampled_from(["a_gated", "b_ungated"]))
def test_models_of_other_projects(data, name):
    with damaged(data, FOLDERS / name, "[cm]*") as folder:
        said(lambda: fla.load(folder), folder)
