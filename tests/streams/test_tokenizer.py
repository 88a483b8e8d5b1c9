"""Tokenizers: whole texts and cut ones have the same ids, and come back."""

import io
import json
import signal
import threading
import time

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import WhitespaceSplit

from deltaproduct_jax.data import tokenizer as module
from deltaproduct_jax.data.tokenizer import (
    describe,
    encoder,
    load_tokenizer,
    open_tokenizer,
    stretches,
    train_bpe,
)
from deltaproduct_jax.errors import ConfigError, RunDirectoryError

TEXTS = ["the cat sat on the mat, and the dog <s> sat\n\n  on\tthe log.  ", "täglich 日本 " * 20]


AS_THEY_ARE = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def trained(texts, **options):
    model, common = io.BytesIO(), {"hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **common, **options
    )
    return model.getvalue()


def sentencepiece_model(**options):
    kind = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True}
    return trained(TEXTS * 5, **kind, **AS_THEY_ARE, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "tokenizer.json").write_bytes(train_bpe(TEXTS, 300).data)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


NAMES = ["bytes", "tokenizer.json", "tokenizer.model"]


def opened(files, name):
    return open_tokenizer(name if name == "bytes" else str(files / name))


def test_a_sentencepiece_model_needs_bos_whichever_id_it_has(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(bos_id=0, unk_id=1))
    assert open_tokenizer(str(path)).bos_id == 0
    path.write_bytes(sentencepiece_model(bos_id=-1, unk_id=0, eos_id=1))
    with pytest.raises(ConfigError, match="has no BOS, the token that begins a document"):
        open_tokenizer(str(path))


@pytest.mark.parametrize("name", NAMES)
def test_texts_come_back_and_never_hold_bos(files, name):
    tokenizer = opened(files, name)
    for text in TEXTS:
        ids = list(tokenizer.encode(text))
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == text
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.bos_id not in ids  # TEXTS[0] spells it out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [40, 41, 57])
def test_cuts_change_no_id(files, name, limit):
    tokenizer = opened(files, name)
    text = TEXTS[0] * 20
    pieces = list(encoder(tokenizer, limit)(text))
    assert len(pieces) > 20
    assert [i for piece in pieces for i in piece] == list(tokenizer.encode(text))


def as_llamas():
    """A file of Hugging Face's that writes a space before a text, and knows every byte."""
    letters = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
    model = tokenizers.models.BPE(
        {letter: number for number, letter in enumerate(letters)},
        [("a", "b")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    made, of = tokenizers.Tokenizer(model), tokenizers
    made.normalizer = of.normalizers.Sequence(
        [of.normalizers.Prepend("▁"), of.normalizers.Replace(" ", "▁")]
    )
    made.decoder = of.decoders.Sequence(
        [
            *(of.decoders.Replace("▁", " "), of.decoders.ByteFallback(), of.decoders.Fuse()),
            of.decoders.Strip(" ", 1, 0),
        ]
    )
    return made.to_str().encode()


WITHOUT_SINGLE_SPACES = {
    "letters": "ab" * 50,
    "words": "日本語täglich" * 9,
    "spaces": "a  b" * 30,
    "lines": "ab\n" * 40,
    "blank": " " * 90,
}


@pytest.mark.parametrize("name", [*NAMES, "llama.json"])
@pytest.mark.parametrize("text", WITHOUT_SINGLE_SPACES.values(), ids=[*WITHOUT_SINGLE_SPACES])
def test_cuts_of_a_text_without_single_spaces_add_nothing(files, name, text):
    (files / "llama.json").write_bytes(as_llamas())
    tokenizer = opened(files, name)
    pieces = list(encoder(tokenizer, 21)(text))
    assert len(pieces) > 4
    assert tokenizer.decode([i for piece in pieces for i in piece]) == text


MODELS = {
    "unigram, normalising": {"vocab_size": 60},
    "normalising, of bytes": {"vocab_size": 320, "byte_fallback": True},
    "as they are, without bytes": {"vocab_size": 60} | AS_THEY_ARE,
    "normalising, without a space before": {"vocab_size": 60, "add_dummy_prefix": False},
}
NORMALISERS = {  # of a tokenizer.json that writes no space before a text
    "both ends": tokenizers.normalizers.Strip(),
    "the left end": tokenizers.normalizers.Strip(right=False),
    "the right end": tokenizers.normalizers.Strip(left=False),
    "runs": tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
}


def normalising(normaliser):
    made = tokenizers.Tokenizer.from_buffer(train_bpe(TEXTS, 300).data)
    made.normalizer = normaliser
    return module.HuggingFaceTokenizer(made.to_str().encode(), "odd.json")


@pytest.mark.parametrize("name", [*MODELS, *NORMALISERS])
def test_cuts_of_what_no_mark_is_kept_by_add_and_lose_nothing(name):
    if name in MODELS:
        model = trained(["the cat sat on ab, ba 日本語 täglich"] * 20, **MODELS[name])
        tokenizer = module.SentencePieceTokenizer(model, name)
    else:
        tokenizer = normalising(NORMALISERS[name])
    texts = [*WITHOUT_SINGLE_SPACES.values(), "a" + " " * 90 + "b", "ab\nba the" * 20]
    for text in [*texts, "the cat sat " * 30]:
        pieces = list(encoder(tokenizer, 21)(text))
        assert [i for piece in pieces for i in piece] == list(tokenizer.encode(text))
    assert len(pieces) > 15  # where it has single spaces


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="ab \n", max_size=200), limit=st.integers(1, 20))
def test_stretches_are_the_text_and_short(text, limit):
    parts = list(stretches(text, limit))
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts) or parts == [""]
    parts = list(stretches(text, limit, anywhere=False))
    assert "".join(parts) == text
    assert all(part[0] == " " and not part[1].isspace() for part in parts[1:])
    assert "" not in parts or parts == [""]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_same_tokenizer(files, name):
    tokenizer = opened(files, name)
    said = json.loads(json.dumps(describe(tokenizer)))
    copy = load_tokenizer(files, said)
    assert describe(copy) == said
    assert list(copy.encode(TEXTS[1])) == list(tokenizer.encode(TEXTS[1]))


def test_another_file_in_its_place_is_refused(files, tmp_path):
    said = describe(opened(files, "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_bytes(train_bpe(TEXTS, 290).data)
    with pytest.raises(RunDirectoryError, match="is not the tokenizer"):
        load_tokenizer(tmp_path, said)


def test_bpe_is_the_same_each_time_and_as_large_as_asked():
    first, second = train_bpe(TEXTS, 280), train_bpe(iter(TEXTS), 280)
    assert first.data == second.data
    assert first.vocab_size == 280
    assert len(first.encode(TEXTS[0])) < len(TEXTS[0].encode())


@pytest.mark.parametrize("text", ["x" * 2**17, " " * 2**17 + "end", "日本" * 2**16])
def test_a_text_without_spaces_takes_no_longer_to_learn_from(text):
    parts = list(module._without_long_runs("a b " + text))
    assert "".join(parts) == "a b " + text
    assert max(map(len, parts)) <= module.LONGEST_RUN + len("a b ")
    began = time.perf_counter()
    train_bpe([text], 280)
    assert time.perf_counter() - began < 10  # whole, each took minutes
    assert list(module._without_long_runs(TEXTS[0] * 99)) == [TEXTS[0] * 99]


def file_of(folder, model, **parts):
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    path = folder / "odd.json"
    tokenizer.save(str(path))
    return path


def test_a_bos_that_a_file_holds_for_a_token_like_others_is_never_read_from_text(tmp_path):
    data = json.loads(train_bpe(TEXTS, 300).data)
    data["added_tokens"][0]["special"] = False
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    tokenizer = open_tokenizer(str(path))
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == TEXTS[0]
    # Models that know it by themselves, as those of SentencePiece's kind do.
    words = tokenizers.models.WordLevel({"<s>": 0, "the": 1, "?": 2}, unk_token="?")
    path = file_of(tmp_path, words, pre_tokenizer=WhitespaceSplit())
    assert open_tokenizer(str(path)).encode("the <s> the<s> <s>") == [1, 2, 2, 2, 2, 2]
    pieces = tokenizers.models.Unigram([("<s>", 0.0), ("?", 0.0), ("s", -2.0), (">", -2.0)], 1)
    path = file_of(tmp_path, pieces)
    assert open_tokenizer(str(path)).encode("s<s>s" * 3) == [2, 1, 2, 3, 2] * 3
    alone = tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?")
    tokenizer = open_tokenizer(str(file_of(tmp_path, alone)), "a")
    with pytest.raises(ConfigError, match="makes bos, 0, of a single character of a text"):
        tokenizer.encode("a")


def test_a_tokenizer_that_cannot_read_every_text_says_so(tmp_path):
    letters = {"<s>": 0, "a": 1, "b": 2}
    path = file_of(tmp_path, tokenizers.models.BPE(letters, []))
    with pytest.raises(ConfigError, match="leaves out characters that it does not know"):
        open_tokenizer(str(path))
    path = file_of(tmp_path, tokenizers.models.WordLevel(letters, unk_token="no"))
    with pytest.raises(ConfigError, match=r"odd\.json cannot read a text: WordLevel error"):
        open_tokenizer(str(path))


def test_the_papers_pieces_are_found_without_importing_their_package(tmp_path, monkeypatch):
    package = tmp_path / "mistral_common"
    (package / "data").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    (package / "__init__.py").write_text("raise ImportError('this one is not to be imported')")
    with pytest.raises(ConfigError, match="pip install --no-deps mistral-common"):
        open_tokenizer("mistral")
    (package / "data" / "tokenizer.model.v1").write_bytes(sentencepiece_model())
    assert open_tokenizer("mistral").kind == "sentencepiece"


def test_errors_name_the_flag(files, tmp_path):
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "no.model").write_text("nothing")
    path = str(files / "tokenizer.json")
    for spec, bos, words in (
        ("words", None, "tokenizer='words' is not known; it may be bytes, mistral"),
        (str(tmp_path / "no.json"), None, "is no tokenizer.json"),
        (str(tmp_path / "no.model"), None, "is no SentencePiece model"),
        (path, "<none>", "bos='<none>' is no token of tokenizer="),
        ("bytes", "<s>", "bos='<s>' is only for a tokenizer.json"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            open_tokenizer(spec, bos)
        assert "\n" not in str(error.value)


def test_a_signal_is_heard_while_a_tokenizer_is_trained():
    seen, release, over = [], threading.Event(), threading.Event()

    def train(pieces):
        seen.append(next(pieces))
        release.wait(60)  # as a library that looks at no signal
        seen.extend(pieces)
        over.set()

    def stop(*_):
        signal.signal(signal.SIGALRM, lambda *_: release.set())
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        raise InterruptedError("stopped")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(InterruptedError, match="stopped"):
            module._while_listening(train, iter("ab"))
        assert over.wait(10)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == ["a"]


def test_what_a_training_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        module._while_listening(lambda pieces: 1 / 0, iter(()))
