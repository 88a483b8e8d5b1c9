"""Streams: the same batches whatever the number of processes, after a kill, read ahead or not."""

import ast
import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags as absl_flags

from deltaproduct_jax.data import packing, standard_library
from deltaproduct_jax.data.config import PrepareConfig, StreamConfig
from deltaproduct_jax.data.packing import Rows
from deltaproduct_jax.data.preparation import prepare
from deltaproduct_jax.data.stream import ENDLESS, TokenStream
from deltaproduct_jax.errors import ConfigError
from experiments.lib import flags

README = Path(__file__).resolve().parents[2] / "deltaproduct_jax" / "data" / "README.md"
BATCH, LENGTH = 8, 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prepared folders whose texts can be told apart, several shards each."""
    folder, draw = tmp_path_factory.mktemp("streams"), random.Random(0)
    for name in ("upper", "lower"):
        letters = "ABCDEFGH" if name == "upper" else "abcdefgh"
        texts = ["".join(draw.choices(letters, k=draw.randint(1, 90))) for _ in range(200)]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        config = PrepareConfig(
            sources=(str(path),), tokenizer="bytes", shard_bytes=2000, workers=1, valid_fraction=0.2
        )
        prepare(config, folder / name)
    return folder


def stream_of(folders, names=("upper", "lower"), weights=(), packing="concatenate", **fields):
    data = tuple(str(folders / name) for name in names)
    fields = {"batch_size": BATCH, "length": LENGTH, "seed": 0} | fields
    return TokenStream(StreamConfig(data, weights, packing), "train", **fields)


def same(first, second):
    for one, other in zip(first, second, strict=True):
        if one is None:
            assert other is None
        else:
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


def joined(batches):
    return Rows(*(None if a[0] is None else np.concatenate(a) for a in zip(*batches, strict=True)))


PACKINGS = pytest.mark.parametrize("packing", ["concatenate", "first_fit"])


@PACKINGS
def test_a_batch_is_the_same_on_any_number_of_processes(folders, packing):
    whole = stream_of(folders, packing=packing)
    for count in (2, 4):
        parts = [
            stream_of(folders, packing=packing, process_index=i, process_count=count)
            for i in range(count)
        ]
        for step in (0, 1, 7, 40):
            batches = [part.batch(step) for part in parts]
            assert batches[0].inputs.shape == (BATCH // count, LENGTH)
            same(joined(batches), whole.batch(step))


@PACKINGS
def test_goes_on_in_the_middle_of_an_epoch_on_another_number(folders, packing):
    undisturbed = stream_of(folders, packing=packing)
    wanted = [undisturbed.batch(step) for step in range(130)]
    epoch = undisturbed.rows_per_epoch // BATCH
    assert 50 < epoch < 130  # the streams below stop within the first and within the second
    for stop, count in ((epoch // 2, 1), (epoch // 2, 4), (epoch + 10, 2)):
        killed = stream_of(folders, packing=packing, process_count=2)
        for step in range(stop):
            killed.batch(step)
        saved = json.loads(json.dumps(killed.state()))
        assert saved["step"] == stop
        new = [
            TokenStream.from_state(saved, process_index=i, process_count=count)
            for i in range(count)
        ]
        assert [s.step for s in new] == [stop] * count
        for step in range(stop, stop + 5):
            same(joined([s.batch(step) for s in new]), wanted[step])
        assert new[0].state() == undisturbed.state() | {"step": stop + 5}


def test_reading_ahead_and_jumping_change_nothing(folders):
    plain, ahead = stream_of(folders, read_ahead=0), stream_of(folders, read_ahead=3)
    for step in (0, 1, 2, 3, 50, 51, 2, 3, 10**9, 0):
        same(ahead.batch(step), plain.batch(step))
        assert ahead.step == step + 1


def test_only_what_may_be_is_read_ahead(folders):
    for ahead in (0, 2):
        stream, rows = stream_of(folders, ("upper",), read_ahead=ahead), []
        row = stream._packings[0].row
        stream._packings[0].row = lambda index, row=row, rows=rows: rows.append(index) or row(index)
        stream.batch(0)
        wanted, until = (1 + ahead) * BATCH, time.monotonic() + 20
        while len(rows) < wanted and time.monotonic() < until:  # reading goes on beside
            time.sleep(0.01)
        assert sorted(rows) == list(range(wanted))


def test_another_seed_is_another_order_and_another_epoch_too(folders):
    first, second = stream_of(folders), stream_of(folders, seed=1)
    assert (first.batch(0).inputs != second.batch(0).inputs).any()
    rows = first._packings[0]
    again = rows.row(rows.rows_per_epoch)
    assert (rows.row(0).inputs != again.inputs).any()


def test_a_mixture_keeps_its_weights_in_every_stretch(folders):
    stream = stream_of(folders, weights=(3.0, 1.0), batch_size=40)
    for step in range(4):
        inputs = stream.batch(step).inputs
        lower = [bool(((row >= ord("a")) & (row < 256)).any()) for row in inputs]
        upper = [bool((row < ord("a")).any()) for row in inputs]
        assert upper == [not of_lower for of_lower in lower]
        assert sum(lower) == 10
    # Each source gives its own rows in order, none left out.
    numbers = [int(stream._numbers[i]) for i in range(400)]
    for index in (0, 1):
        rows = [n % ENDLESS for n in numbers if n // ENDLESS == index]
        assert rows == list(range(len(rows)))


def test_bits_per_byte_has_its_measure(folders):
    stream = stream_of(folders, weights=(3.0, 1.0))
    shares = [corpus.num_bytes / corpus.num_tokens for corpus in stream.corpora]
    assert all(share < 1 for share in shares)  # bytes, and BOS once a document
    assert stream.bytes_per_token == pytest.approx(0.75 * shares[0] + 0.25 * shares[1])
    assert (stream.vocab_size, stream.bos_id) == (257, 256)


def test_bits_per_byte_are_of_the_tokens_that_count_beside_padding(tmp_path):
    """Rows of the one text are full of short words, of the other each has a long one alone."""
    word = {"short": "ab", "long": "x" * 18}
    for name, text in word.items():
        lines = "\n".join(json.dumps({"text": text + chr(97 + i)}) for i in range(26))
        (tmp_path / f"{name}.jsonl").write_text(lines)
        fields = {"tokenizer": "bytes", "valid_fraction": 0.0, "test_fraction": 0.0, "workers": 1}
        prepare(PrepareConfig((str(tmp_path / f"{name}.jsonl"),), **fields), tmp_path / name)
    stream = stream_of(tmp_path, word, packing="first_fit", batch_size=364)
    rows = stream.batch(0)  # whole epochs of both
    of_text = rows.mask & (rows.targets != stream.bos_id)
    assert rows.mask[:, 20:].any()
    assert not rows.mask.all()
    assert stream.bytes_per_token == pytest.approx(of_text.sum() / rows.mask.sum(), rel=0.01)


def test_moved_folders_are_found_and_others_refused(folders, tmp_path):
    stream = stream_of(folders, ("upper",))
    stream.batch(3)
    state = stream.state()
    with pytest.raises(ConfigError, match="must be as many folders as the run began with, 1"):
        TokenStream.from_state(state, data=("a", "b"))
    with pytest.raises(ConfigError, match=r"state\.seed is missing"):
        TokenStream.from_state({key: state[key] for key in state if key != "seed"})
    (tmp_path / "moved").symlink_to(folders / "upper")
    moved = TokenStream.from_state(state, data=(str(tmp_path / "moved"),))
    same(moved.batch(4), stream.batch(4))
    with pytest.raises(ConfigError, match="does not hold the tokens that the run began with"):
        TokenStream.from_state(state, data=(str(folders / "lower"),))


def test_errors_name_the_argument(folders):
    for fields, words in (
        ({"process_count": 3}, "batch_size=8 must be a multiple of the number of processes, 3"),
        ({"length": 0}, "length=0 is too small"),
        ({"length": 10**6}, "length=1000000 is too long"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 must be from 0 to below 2"),
        ({"seed": -1}, "seed=-1 is too small"),
        ({"read_ahead": -1}, "read_ahead=-1 is too small"),
        ({"names": ("upper", "stdlib")}, "has no manifest.json"),
    ):
        with pytest.raises((ConfigError, OSError), match=words):
            stream_of(folders, **fields)
    for fields, words in (
        ({"packing": "tight"}, "packing='tight' is not known"),
        ({"data": ()}, "data is empty"),
        ({"data_weights": (1.0, 2.0)}, "must be as many as data"),
        ({"data_weights": (0.0,)}, "must be greater than 0"),
        ({"data_weights": (float("nan"),)}, "must be a finite number"),
        ({"data": "stdlib"}, "data='stdlib' must be texts"),
    ):
        with pytest.raises(ConfigError, match=words):
            StreamConfig(**fields)
    with pytest.raises(ConfigError, match="step=-1 is too small"):
        stream_of(folders).batch(-1)


def test_fields_are_flags(folders):
    argv = [f"--data={folders / 'upper'},{folders / 'lower'}", "--data_weights=.7,.3"]
    argv += ["--packing=first_fit", "--workdir=out"]
    parsed = flags.parse(argv, {"data": StreamConfig}, {"default": {}})
    config = StreamConfig(**parsed.sections["data"])
    assert config.data == (str(folders / "upper"), str(folders / "lower"))
    assert (config.data_weights, config.packing) == ((0.7, 0.3), "first_fit")
    with pytest.raises(absl_flags.Error, match=r"data_weights.*numbers such as \.7,\.3"):
        flags.parse(["--data_weights=a", "--workdir=out"], {"data": StreamConfig}, {"default": {}})


def test_another_tokenizer_is_refused(folders, tmp_path):
    config = PrepareConfig(
        sources=(str(folders / "upper.jsonl"),), vocab_size=257, workers=1, valid_fraction=0
    )
    prepare(config, tmp_path / "bpe")
    with pytest.raises(ConfigError, match="was made by another tokenizer than"):
        stream_of(folders, ("upper", tmp_path / "bpe"))


def test_the_standard_library_is_held_out_by_file(tmp_path):
    for number in range(200):
        (tmp_path / f"{number}.py").write_text(f"x = {number}\n" * 3)
    (tmp_path / "copy.py").write_text("x = 0\n" * 3)
    (tmp_path / "sitecustomize.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("y = 1\n")
    found = {}
    for split in ("train", "valid", "test"):
        corpus = standard_library.standard_library(split, tmp_path)
        documents = [corpus.document(i) for i in range(len(corpus.offsets) - 1)]
        assert all(ids[0] == 256 for ids in documents)
        found[split] = [bytes(ids[1:].astype(np.uint8)).decode() for ids in documents]
    everything = [text for texts in found.values() for text in texts]
    assert len(everything) == 201
    assert not set(found["train"]) & {*found["valid"], *found["test"]}  # the copy included
    assert not any("y" in text for text in everything)
    assert 2 <= len(found["valid"]) <= 25
    assert 2 <= len(found["test"]) <= 25
    with pytest.raises(ConfigError, match="split='all' is not known"):
        standard_library.standard_library("all", tmp_path)


def test_this_pythons_sources_are_millions_of_bytes():
    stream = TokenStream(StreamConfig(), "valid", batch_size=2, length=512, seed=0)
    assert stream.corpora[0].num_bytes > 200_000
    text = bytes(stream.batch(0).inputs[0].clip(0, 255).astype(np.uint8)).decode(errors="replace")
    assert re.search(r"\b(self|return|import|def|in|the)\b", text)


def test_packages_are_imported_only_where_they_are_used():
    for path in README.parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
            assert packages <= {"deltaproduct_jax", "numpy", "tqdm"}, path


def test_a_missing_package_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ConfigError, match=r"needs the package grain; pip install .*\[data\]"):
        stream_of(folders)


def test_readme(tmp_path, monkeypatch):
    """Its examples, one after another."""
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code) >= 3
    names = {}
    for number, example in enumerate(code):
        exec(compile(example, f"{README.name}: {number}", "exec"), names)
    assert set(packing.PACKINGS) == {"concatenate", "first_fit"}
    assert all(name in README.read_text() for name in packing.PACKINGS)
