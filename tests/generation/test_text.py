"""Text of tokens as they come: nothing is taken back, no character broken, no stop string shown."""

import io

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltaproduct_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, train_bpe
from deltaproduct_jax.models.generation.text import StopStrings, TextStream

TEXTS = ["the cat sat on the mat, and the dog sat\n\n  on\tthe log.  ", "täglich 日本 🙂 " * 20]
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def tokenizers():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = SentencePieceTokenizer(model.getvalue(), "model")
    return [BYTES, train_bpe(TEXTS, 300), pieces]


def pieces(decode, ids, prompt=()):
    stream = TextStream(decode, prompt)
    return [*map(stream.push, ids), stream.close()]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 256), st.sampled_from(list("é日🙂".encode()))), max_size=60)
)
@example(list("a日".encode())[:-1])
@example([0xF0, 0x9F, 0x99, 0x41])
@example([0xFF] * 50)
def test_any_bytes_come_out_as_they_decode(ids):
    assert "".join(pieces(BYTES.decode, ids)) == BYTES.decode(ids)


def test_whole_texts_come_out_behind_a_prompt(tokenizers):
    for tokenizer in tokenizers:
        for text in TEXTS:
            ids = list(tokenizer.encode(text))
            for cut in (0, 1, 7, len(ids) // 2):
                shown = "".join(pieces(tokenizer.decode, ids[cut:], ids[:cut]))
                before = tokenizer.decode(ids[:cut])
                if not before.endswith("\ufffd"):  # the cut is within no character
                    assert before + shown == text, (tokenizer.kind, cut)


def test_a_character_waits_for_its_last_byte():
    ids = list("a日b".encode())
    assert pieces(BYTES.decode, ids) == ["a", "", "", "日", "b", ""]
    assert pieces(BYTES.decode, ids[:3]) == ["a", "", "", "\ufffd"]
    # Begun by the prompt, it comes out where it ends.
    assert pieces(BYTES.decode, ids[2:], ids[:2]) == ["", "日", "b", ""]


def test_what_is_certain_does_not_wait_for_what_is_not():
    """Tokens of several bytes, which end within a character or begin within one."""
    parts = [b"word\xe6", b"\x97", b"\xa5b"]
    decode = lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace")
    assert pieces(decode, range(3)) == ["word", "", "日b", ""]


def test_a_decoder_may_mark_a_whole_run_until_it_is_complete():
    def decode(ids):
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)

    assert pieces(decode, "日本".encode()) == ["", "", "日", "", "", "本", ""]


def test_words_keep_their_spaces(tokenizers):
    tokenizer = tokenizers[2]
    ids = list(tokenizer.encode("the cat sat"))
    prompt = list(tokenizer.encode("the"))
    assert ids[: len(prompt)] == prompt
    assert "".join(pieces(tokenizer.decode, ids[len(prompt) :], prompt)) == " cat sat"


def test_decoded_anew_is_a_short_stretch_however_long_the_text():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return BYTES.decode(ids)

    ids = list(b"word " * 200) + [0xFF] * 1000 + list(b" and on")
    shown = "".join(pieces(decode, ids))
    assert shown.startswith("word ")
    assert shown.endswith(" and on")
    assert longest < 200


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_text_ends_where_the_first_stop_string_begins(text, stops, data):
    """However it is cut into pieces."""
    where = StopStrings(stops)
    shown, at = "", 0
    while at < len(text) and where.found is None:
        step = data.draw(st.integers(1, 4))
        shown += where.push(text[at : at + step])
        at += step
    shown += where.close()
    read = text[:at]
    places = [read.find(stop) for stop in stops if stop in read]
    assert (where.found is not None) == bool(places)
    assert shown == (read[: min(places)] if places else text)


def test_what_may_begin_a_stop_string_waits():
    where = StopStrings(["stop", "op!"])
    assert [where.push(c) for c in "a sto"] == ["a", " ", "", "", ""]
    assert where.push("c") == "stoc"
    assert [where.push(c) for c in "sto"] == ["", "", ""]
    assert where.push("p and more") == ""
    assert where.found == "stop"
    assert where.push("never") == where.close() == ""
