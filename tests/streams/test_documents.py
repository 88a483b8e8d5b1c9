"""Documents from files that are not what they should be, cut anywhere."""

import json
import os
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltaproduct_jax.data.documents import Source, list_sources, plan_pieces, read
from deltaproduct_jax.errors import ConfigError

GIGANTIC = "words of a gigantic document " * 20_000


def documents(path, piece_bytes=2**20, field="text"):
    """All documents of a file or folder, and what was wrong."""
    counts = Counter()
    pieces = plan_pieces(list_sources([str(path)], ["*"]), piece_bytes)
    texts = [t for piece in pieces for part in piece for t in read(part, field, counts)]
    return texts, {name: count for name, count in counts.items() if count}


def parquet_of(path, values, kind=None, rows=2):
    """A file whose text need not be UTF-8, in groups of few rows."""
    column = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    column = column.cast(kind) if kind is not None else column
    table = pyarrow.table({"url": pyarrow.array(range(len(values))), "text": column})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


@pytest.mark.parametrize("piece_bytes", [1, 2**30])
def test_parquet_with_nulls_empty_gigantic_and_invalid(tmp_path, piece_bytes):
    values = [b"one", None, b"", GIGANTIC.encode(), b"ab\xffc", "ä€".encode(), None]
    parquet_of(tmp_path / "a.parquet", values)
    texts, counts = documents(tmp_path, piece_bytes)
    assert texts == ["one", GIGANTIC, "ab\ufffdc", "ä€"]
    assert counts == {"null": 2, "empty": 1, "invalid_utf8": 1}


def test_parquet_with_a_dictionary_of_texts(tmp_path):
    kind = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    parquet_of(tmp_path / "a.parquet", [b"one", b"two", None, b"one"], kind)
    assert documents(tmp_path) == (["one", "two", "one"], {"null": 1})


LINES = [
    ({"text": "one"}, "one"),
    ({"text": "two\nlines, ä"}, "two\nlines, ä"),
    ({"text": ""}, "empty"),
    ({"text": None}, "null"),
    ({"other": "text"}, "null"),
    ({"text": 3}, "malformed"),
    (["text"], "malformed"),
]


def test_json_lines_of_every_kind(tmp_path):
    lines = [json.dumps(entry).encode() for entry, _ in LINES]
    lines += [b"", b'{"text": "cut', b"[" * 100_000, b'{"text": "\xff"}', b'{"text": "\\ud83d"}']
    lines += [json.dumps({"text": GIGANTIC}).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    texts, counts = documents(tmp_path)
    assert texts == ["one", "two\nlines, ä", "\ufffd", "\ufffd", GIGANTIC]
    assert counts == {"empty": 1, "null": 2, "malformed": 4, "invalid_utf8": 2}


# Lines of 15 bytes: every cut is where a line begins.
@example(texts=["ab", "cd", "ef", "gh"], piece=15)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=30), max_size=10), piece=st.integers(7, 200))
def test_json_lines_cut_anywhere(texts, piece, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert documents(path, piece)[0] == texts


def test_a_folder_of_text_is_read_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.c").write_bytes(b"b\xfe")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.txt").write_text("")
    texts, counts = documents(tmp_path, piece_bytes=1)
    assert texts == ["a", "b\ufffd"]
    assert counts == {"invalid_utf8": 1, "empty": 1}
    named = [str(tmp_path / "a.txt"), str(tmp_path), str(tmp_path / "deep/../a.txt")]
    (tmp_path / "deep" / "gone.txt").symlink_to(tmp_path / "nowhere")
    counts = Counter()
    assert len(list_sources(named, ["*.txt"], counts)) == 2  # each once
    assert counts == {"no_file": 1}


def test_what_is_made_of_a_folder_inside_it_is_no_part_of_it(
    tmp_path, tmp_path_factory, monkeypatch
):
    for name in ("a.json", "out/manifest.json", "out/.prepare/plan.json", "in/out/b.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    for without in (tmp_path / "out", tmp_path / "in" / ".." / "out", link, Path(), Path("no")):
        found = list_sources([str(tmp_path)], ["*.json"], without=without)
        names = [source.path.removeprefix(f"{tmp_path}/") for source in found]
        kept = ["a.json", "in/out/b.json"]
        assert [name for name in names if not name.startswith("out/")] == kept
        assert (names == kept) == (without.name != "no")
    # What is named itself is taken, and so are files of a folder that is in the other.
    assert len(list_sources([str(tmp_path / "in")], ["*"], without=tmp_path)) == 1


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("a")
    plain = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"^sources: .*/deep cannot be read: Permission denied$"):
        list_sources([str(tmp_path)], ["*.txt"])


def test_small_files_make_one_piece_and_large_ones_several(tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    (tmp_path / "g.jsonl").write_text("\n" * 65)
    sizes = [len(piece) for piece in plan_pieces(list_sources([str(tmp_path)], ["*"]), 30)]
    assert sizes == [3, 3, 1, 1, 1]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    lines = ['{"text": "two"}', '\ufeff{"text": "three"}', "\ufeff", '{"text": "\ufefffour"}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    assert documents(tmp_path) == (["one", "two", "three", "\ufefffour"], {})


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip"])
def test_a_parquet_file_whose_pages_are_damaged_is_one_line(compression, tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{i} " * i for i in range(300)]})
    pyarrow.parquet.write_table(table, path, compression=compression)
    data = bytearray(path.read_bytes())
    data[100:1100] = bytes(1000)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"^sources: .*/a\.parquet cannot be read as Parquet: ."):
        documents(path)


def test_pieces_of_many_files_are_planned_at_once_and_too_many_are_refused():
    sources = [Source(f"{number}.txt", 1, 0, f"{number}.txt") for number in range(50_000)]
    begun = time.process_time()
    assert len(plan_pieces(sources, 30_000)) == 2
    assert time.process_time() - begun < 2  # of a sum anew for each it was 6
    with pytest.raises(ConfigError, match="shard_bytes=1 makes more than 100,000 shards"):
        plan_pieces([Source("a.jsonl", 10**12, 0, "a.jsonl")], 1)


def test_errors_name_the_flag(tmp_path):
    parquet_of(tmp_path / "a.parquet", [b"one"])
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    (tmp_path / "c.parquet").write_bytes(b"no parquet")
    for path, field, words in (
        ("nowhere", "text", "sources=.*is not there"),
        ("a.parquet", "txt", r"text_field='txt' is no column of .*\['url', 'text'\]"),
        ("a.parquet", "url", "text_field='url'.*int64; it must be text"),
        ("b.jsonl.gz", "text", "is compressed"),
        ("c.parquet", "text", "cannot be read as Parquet"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            documents(tmp_path / path, field=field)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="hold no file that matches pattern="):
        list_sources([str(tmp_path)], ["*.txt"])
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("one")
    with pytest.raises(ConfigError, match="is no UTF-8"):
        list_sources([str(tmp_path)], ["*.txt"])
    with pytest.raises(ConfigError, match="sources is empty"):
        list_sources([], ["*"])
    with pytest.raises(ConfigError, match="sources is empty"):
        list_sources([""], ["*"])
