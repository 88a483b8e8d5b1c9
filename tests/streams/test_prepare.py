"""Preparing tokens: what is written, the same bytes after a kill anywhere, one-line errors."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deltaproduct_jax.data import preparation as module
from deltaproduct_jax.data import shards
from deltaproduct_jax.data.config import PrepareConfig
from deltaproduct_jax.data.corpus import open_corpus
from deltaproduct_jax.data.preparation import prepare
from deltaproduct_jax.data.tokenizer import tokenizer_of
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from experiments import prepare_text
from experiments.lib import flags

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "täglich", "日本", "dogs", "bark"]


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """A kill loses nothing that was written; only a machine that goes down would."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Text in two folders and lines of JSON, 300 documents in all, and three that are none."""
    folder = tmp_path_factory.mktemp("sources")
    draw = random.Random(0)
    texts = [f"{i}: " + " ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for i in range(300)]
    for number, text in enumerate(texts[:100]):
        path = folder / ("drivers" if number % 10 == 0 else "core") / f"{number:03d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    lines = [json.dumps({"text": text}) for text in [*texts[100:], "", None]]
    (folder / "lines.jsonl").write_text("\n".join([*lines, "{"]))
    return folder, texts


def config_for(sources, **fields):
    fields = {"tokenizer": "bytes", "workers": 1, "shard_bytes": 4000} | fields
    return PrepareConfig(sources=(str(sources[0]),), **fields)


def hashes_of(directory):
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def texts_in(directory, split):
    corpus, tokenizer = open_corpus(directory, split), tokenizer_of(directory)
    documents = [corpus.document(i) for i in range(len(corpus.offsets) - 1)]
    assert all(ids[0] == corpus.bos_id for ids in documents)
    return [tokenizer.decode(ids[1:]) for ids in documents]


def test_every_document_is_in_one_split_and_comes_back(sources, tmp_path):
    config = config_for(sources, valid_fraction=0.1, test_fraction=0.2)
    manifest = prepare(config, tmp_path)
    by_split = {split: texts_in(tmp_path, split) for split in manifest["splits"]}
    assert sorted(t for texts in by_split.values() for t in texts) == sorted(sources[1])
    assert 15 < len(by_split["valid"]) < 50 < len(by_split["test"]) < 80
    assert manifest["counts"] == {
        "documents": 300,
        "long": 0,
        "empty": 1,
        "null": 1,
        "malformed": 1,
        "invalid_utf8": 0,
        "no_file": 0,
    }
    for split, said in manifest["splits"].items():
        assert said["documents"] == len(by_split[split])
        assert said["bytes"] == sum(len(text.encode()) for text in by_split[split])
        assert said["tokens"] == said["bytes"] + said["documents"]  # bytes, and BOS
        assert len(said["shards"]) > 3
        for shard in said["shards"]:
            for name, sha256 in shard["sha256"].items():
                assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == sha256
            tokens = np.load(tmp_path / f"{shard['name']}.tokens.npy", mmap_mode="r")
            assert tokens.dtype.name == manifest["dtype"] == "uint16"
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".npy"} == {
        "manifest.json",
        "config.json",
    }


def test_the_split_of_a_document_hangs_on_nothing_else(sources, tmp_path):
    prepare(config_for(sources, valid_fraction=0.1), tmp_path / "a")
    prepare(config_for(sources, valid_fraction=0.1, shard_bytes=10**9), tmp_path / "b")
    assert texts_in(tmp_path / "a", "valid") == texts_in(tmp_path / "b", "valid")
    prepare(config_for(sources, valid_paths=("*/drivers/*",), test_fraction=0), tmp_path / "c")
    assert texts_in(tmp_path / "c", "valid") == sources[1][:100:10]
    assert len(texts_in(tmp_path / "c", "train")) == 290


def test_a_trained_bpe_is_kept_and_never_sees_what_is_held_out(sources, tmp_path, monkeypatch):
    config = config_for(sources, tokenizer="bpe", vocab_size=300, valid_fraction=0.3)
    seen = []
    train = module.tokenizer.train_bpe
    monkeypatch.setattr(
        module.tokenizer,
        "train_bpe",
        lambda texts, size: train([seen.append(t) or t for t in texts], size),
    )
    manifest = prepare(config, tmp_path)
    assert manifest["tokenizer"]["vocab_size"] == 300
    assert sorted(seen) == sorted(texts_in(tmp_path, "train"))
    assert set(seen) | set(texts_in(tmp_path, "valid")) <= set(sources[1])
    some = PrepareConfig(**dataclasses.asdict(config) | {"train_bytes": 2000})
    seen.clear()
    prepare(some, tmp_path / "some")
    assert 2000 < sum(len(text.encode()) for text in seen) < 6000


def test_a_gigantic_document_is_one_and_longer_than_a_shard(tmp_path):
    text = "gigantic " * 100_000
    (tmp_path / "a.txt").write_text(text)
    out = tmp_path / "out"
    config = config_for((tmp_path,), shard_bytes=1000, valid_fraction=0, test_fraction=0)
    assert prepare(config, out)["counts"]["long"] == 1
    assert texts_in(out, "train") == [text]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_kill_at_any_write_changes_no_byte(sources, tmp_path, monkeypatch):
    fields = {"tokenizer": "bpe", "vocab_size": 260, "train_bytes": 1000}
    config = config_for(sources, shard_bytes=20_000, **fields)
    prepare(config, tmp_path / "whole")
    whole = hashes_of(tmp_path / "whole")
    replace, left = os.replace, [0]

    def dies(source, target):
        if left[0] == 0:
            raise Killed  # the temporary file is left behind
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(shards.os, "replace", dies)
    kills = 0
    for budget in range(100):
        directory = tmp_path / f"after_{budget}"
        left[0] = budget
        try:
            prepare(config, directory)
        except Killed:
            kills += 1
            left[0] = 10**6
            prepare(config, directory)
            assert hashes_of(directory) == whole
            continue
        break
    assert kills > 15


ENDS = [
    pytest.param(signal.SIGKILL, -signal.SIGKILL, None, marks=pytest.mark.slow),
    (signal.SIGTERM, 143, "stopped by SIGTERM; the same command goes on\n"),
    pytest.param(
        signal.SIGINT,
        130,
        "stopped by Ctrl-C; the same command goes on\n",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("number", "code", "says"), ENDS)
def test_ended_from_outside_goes_on_and_leaves_no_process(number, code, says, sources, tmp_path):
    config = config_for(sources, shard_bytes=500)
    argv = [f"--sources={sources[0]}", "--tokenizer=bytes", "--shard_bytes=500", "--workers=2"]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "experiments.prepare_text", *argv, f"--workdir={out}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    records = out / module.UNDER_WAY
    until = time.monotonic() + 60
    while not len(list(records.glob("0*.json"))) and time.monotonic() < until:
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    done = len(list(records.glob("0*.json")))
    assert process.returncode == code
    lines = [line for line in said.splitlines(True) if not line.startswith("tokenizing ")]
    assert says is None or lines == [says]  # and progress, where the machine is slow
    assert 0 < done < 60
    assert not (out / "manifest.json").exists()
    assert len(children) >= 2
    while any(_runs(pid) for pid in children) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(_runs(pid) for pid in children)
    prepare(config, out)
    prepare(config, tmp_path / "whole")
    assert hashes_of(out) == hashes_of(tmp_path / "whole")


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_command_prints_the_counts_and_refuses_a_mixture(sources, tmp_path, capsys):
    argv = [f"--sources={sources[0]}", "--tokenizer=bytes", "--workers=1"]
    argv += ["--valid_fraction=.1", "--test_fraction=0", f"--workdir={tmp_path / 'out'}"]
    assert flags.run(prepare_text.command, argv) == 0
    shown, said = capsys.readouterr()
    assert "no document is in test, and training needs" in said
    assert "valid" in shown
    assert "documents 300" in shown
    before = hashes_of(tmp_path / "out")
    again = [f"--config={tmp_path / 'out' / 'config.json'}", f"--workdir={tmp_path / 'out'}"]
    assert flags.run(prepare_text.command, again) == 0
    assert capsys.readouterr().out == shown
    assert flags.run(prepare_text.command, [*argv, "--valid_fraction=.2"]) == flags.USAGE_ERROR
    error = capsys.readouterr().err
    assert "was prepared with valid_fraction=0.1, not 0.2; give another --workdir" in error
    assert error.count("\n") == 1
    assert hashes_of(tmp_path / "out") == before


def test_other_sources_under_the_same_name_are_refused(tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("one")
    config = config_for((path,), valid_fraction=0, test_fraction=0)
    prepare(config, out)
    path.write_text("another")
    with pytest.raises(RunDirectoryError, match="from other sources, or they have changed"):
        prepare(config, out)


@pytest.mark.parametrize("is_done", [True, False])
def test_sources_that_were_moved_are_the_same_text(is_done, tmp_path, monkeypatch):
    old, new, out = (tmp_path / name for name in ("old", "new", "out"))
    for number in range(4):
        path = old / "fs" / f"{number}.c"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number} " * 600)
    fields = {"valid_paths": ("*/fs/1*",), "test_paths": ("*/fs/2*",), "shard_bytes": 1000}
    fields["pattern"] = ("*.c", "*.txt")
    if is_done:
        prepare(config_for((old,), **fields), out)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_manifest", raising(Killed()))
            with pytest.raises(Killed):
                prepare(config_for((old,), **fields), out)
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    old.rename(new)
    assert prepare(config_for((new,), **fields), out)["splits"].keys() == {"train", "valid", "test"}
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.npy")} == shards
    for change in (
        lambda folder: (folder / "3.c").write_text("7 " * 600),
        lambda folder: (folder / "3.c").rename(folder / "0.txt"),
        lambda folder: folder.rename(folder.with_name("other")),  # of which nothing is held out
    ):
        shutil.rmtree(tmp_path / "third", ignore_errors=True)
        shutil.copytree(new, tmp_path / "third")
        change(tmp_path / "third" / "fs")
        with pytest.raises(RunDirectoryError, match=r"was prepared with sources=\["):
            prepare(config_for((tmp_path / "third",), **fields), out)


def raising(error):
    def raises(*_):
        raise error

    return raises


def test_a_mistake_that_made_nothing_can_be_put_right(sources, tmp_path):
    right = config_for(sources, tokenizer="bpe", vocab_size=300, pattern=("*.jsonl",))
    prepare(right, tmp_path / "right")
    out = tmp_path / "out"
    wrong = dataclasses.replace(right, text_field="body")
    with pytest.raises(ConfigError, match=r"no document with text in text_field='body'.*null 20\d"):
        prepare(wrong, out)
    assert not out.exists()
    with pytest.raises(ConfigError, match="tokenizer='nowhere'"):
        prepare(config_for(sources, tokenizer="nowhere"), out)
    assert not out.exists()
    begun = {"config": wrong.identity(), "sources": []}
    (out / module.UNDER_WAY).mkdir(parents=True)
    (out / module.UNDER_WAY / "plan.json").write_text(json.dumps(begun))
    (out / "tokenizer.json").write_text("of the other")
    prepare(right, out)
    assert hashes_of(out) == hashes_of(tmp_path / "right")
    again = tmp_path / "again"
    (again / module.UNDER_WAY).mkdir(parents=True)
    (again / module.UNDER_WAY / "plan.json").write_text(json.dumps(begun))
    (again / module.UNDER_WAY / "00000.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="was begun with text_field='body', not 'text'"):
        prepare(right, again)


def test_errors_name_the_flag(sources, tmp_path):
    for fields, words in (
        ({"vocab_size": 300}, "vocab_size=300 is only for tokenizer=bpe"),
        ({"train_bytes": 300}, "train_bytes=300 is only for tokenizer=bpe"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "vocab_size=256 is too small"),
        ({"tokenizer": "bpe", "vocab_size": 10**30}, "is too large; it may be up to"),
        ({"tokenizer": "bpe", "bos": "<s>"}, "bos='<s>' is only for a tokenizer.json"),
        ({"workers": 0}, "workers=0 is too small"),
        ({"valid_fraction": 1.5}, "valid_fraction=1.5 must be at least 0 and below 1"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
    ):
        with pytest.raises(ConfigError, match=words):
            config_for(sources, **fields)
    out = tmp_path / "used"
    out.mkdir()
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="which no preparation"):
        prepare(config_for(sources), out)
    with pytest.raises(RunDirectoryError, match="has no manifest"):
        open_corpus(out, "train")
    done = tmp_path / "done"
    prepare(config_for(sources, valid_fraction=0), done)
    with pytest.raises(ConfigError, match="has no split 'valid'; it has train"):
        open_corpus(done, "valid")
    path = done / "train-00000.tokens.npy"
    tokens = np.load(path)
    tokens[5] = 60_000
    np.save(path, tokens)
    with pytest.raises(RunDirectoryError, match=r"is damaged: it has token 60000, and its token"):
        open_corpus(done, "train").document(0)
    for array, words in (
        (tokens.astype(np.float32), r"npy is damaged: it has float32\["),
        (tokens[None], r"npy is damaged: it has uint16\[1, "),
        (tokens[:-1], "is not what manifest"),
    ):
        np.save(path, array)
        with pytest.raises(RunDirectoryError, match=words):
            open_corpus(done, "train")
    path.write_bytes(b"")
    with pytest.raises(RunDirectoryError, match=r"tokens.npy cannot be read: \w"):
        open_corpus(done, "train")
    np.save(path, np.zeros(3, np.uint16))
    with pytest.raises(RunDirectoryError, match="is not what manifest"):
        open_corpus(done, "train")
    for text, words in (
        ("{", "manifest.json is not valid JSON"),
        ('{"format": 2}', "has format=2; this version reads 1"),
        ('{"format": 1}', "config is missing"),
    ):
        (out / "manifest.json").write_text(text)
        with pytest.raises(RunDirectoryError, match=words):
            open_corpus(out, "train")
    (done / "train-00000.offsets.npy").unlink()
    with pytest.raises(RunDirectoryError, match=r"train-00000.offsets.npy cannot be read"):
        open_corpus(done, "train")


def test_one_call_at_a_time(sources, tmp_path):
    with (
        module._locked(tmp_path),
        pytest.raises(RunDirectoryError, match="is being prepared by another process"),
    ):
        prepare(config_for(sources), tmp_path)
