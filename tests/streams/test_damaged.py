"""Tokens whose bytes are no longer what was written: one line that names the file."""

import shutil

import numpy as np
import pytest

from deltaproduct_jax.data import PrepareConfig, StreamConfig, TokenStream, open_corpus, prepare
from deltaproduct_jax.errors import RunDirectoryError
from experiments import prepare_text
from experiments.lib import flags

TOKENS, OFFSETS = "train-00001.tokens.npy", "valid-00000.offsets.npy"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Text of two shards a split; not to be changed."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"the {number}th " + "line of a text\n" * number)
    config = PrepareConfig(
        sources=(str(folder),), tokenizer="bytes", valid_fraction=0.3, workers=1, shard_bytes=6000
    )
    prepare(config, folder / "tokens")
    return folder / "tokens"


@pytest.fixture
def tokens(prepared, tmp_path):
    """A copy, with nothing beside it."""
    return shutil.copytree(prepared, tmp_path / "tokens")


def _flip(path):
    """One bit of the last number."""
    data = bytearray(path.read_bytes())
    data[-8 if "offsets" in path.name else -2] ^= 1
    path.write_bytes(data)


def _move_a_boundary(path):
    offsets = np.load(path)
    offsets[1] += 1
    np.save(path, offsets)


def verified(folder, *more):
    return flags.run(prepare_text.command, ["--verify", f"--workdir={folder}", *more])


def test_a_copy_is_verified_without_its_sources(tokens, capsys):
    tokens.chmod(0o500)  # nothing is written
    assert verified(tokens, "--workers=2") == 0
    said = capsys.readouterr().out
    assert "documents" in said
    assert f"every file in {tokens} has the hash" in said
    for more in ("--sources=text", "--tokenizer=bytes", f"--config={tokens / 'config.json'}"):
        assert verified(tokens, more) == flags.USAGE_ERROR
        assert "is for preparing, and --verify prepares nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "damage"), [(TOKENS, _flip), (OFFSETS, _move_a_boundary)])
def test_what_no_count_tells_is_found_by_its_hash(name, damage, tokens, capsys):
    damage(tokens / name)
    for split in ("train", "valid"):
        open_corpus(tokens, split)
    assert verified(tokens) == flags.USAGE_ERROR
    error = capsys.readouterr().err
    assert f"{tokens / name} is damaged: its SHA-256 is not that of manifest.json; copy" in error
    assert error.count("\n") == 1
    _flip(tokens / "train-00000.tokens.npy")
    verified(tokens)
    assert ", and so are 1 more;" in capsys.readouterr().err
    (tokens / TOKENS).unlink()
    verified(tokens)
    assert f"{tokens / TOKENS} cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", [TOKENS, "train-00000.offsets.npy"])
def test_sizes_are_compared_whenever_a_folder_is_opened(name, tokens):
    whole = (tokens / name).read_bytes()
    for data, words in (
        (whole + b"\0\0", f"{name} is damaged: it has {len(whole) + 2} bytes, and its array"),
        (whole[:-1], f"{name} cannot be read: "),
    ):
        (tokens / name).write_bytes(data)
        with pytest.raises(RunDirectoryError, match=words):
            open_corpus(tokens, "train")


@pytest.mark.parametrize(
    "damaged",
    [
        lambda at: [at[0], *at[2:]],
        lambda at: [at[0], at[0] + 1, *at[1:]],
        lambda at: [1, *at[1:]],
        lambda at: [*at[:-1], at[-1] + 1],
        lambda at: [at[0], at[2], at[1], *at[3:]],
        lambda at: [at[0], at[2], *at[2:]],
    ],
    ids=["fewer", "more", "begins late", "ends late", "descends", "a document of nothing"],
)
def test_documents_that_cannot_be_are_seen_when_a_folder_is_opened(damaged, tokens):
    offsets = np.load(tokens / OFFSETS)
    assert len(offsets) > 4
    np.save(tokens / OFFSETS, np.asarray(damaged(offsets.tolist()), offsets.dtype))
    with pytest.raises(RunDirectoryError, match=r"valid-00000 is not what manifest\.json says"):
        open_corpus(tokens, "valid")


@pytest.mark.parametrize("packing", ["concatenate", "first_fit"])
def test_an_id_that_is_no_token_ends_the_batch_that_has_it(packing, tokens):
    ids = np.load(tokens / TOKENS)
    ids[ids == ord("x")] = 257  # the first behind the tokenizer's
    np.save(tokens / TOKENS, ids)
    config = StreamConfig(data=(str(tokens),), packing=packing)
    stream = TokenStream(config, "train", batch_size=4, length=32, seed=0)
    steps = stream.rows_per_epoch // 4 + 1
    with pytest.raises(RunDirectoryError, match=r"token 257, and its tokenizer 257 .* --verify"):
        list(map(stream.batch, range(steps)))


def test_a_write_that_ends_early_says_why(tmp_path):
    """As a full disk makes it, of which not all is full yet when a file is begun."""
    resource = pytest.importorskip("resource")
    (tmp_path / "text.jsonl").write_text('{"text": "a b"}\n' * 9999)
    config = PrepareConfig((str(tmp_path / "text.jsonl"),), tokenizer="bytes", workers=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
    try:
        with pytest.raises(RunDirectoryError, match="cannot be written: File too large"):
            prepare(config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
