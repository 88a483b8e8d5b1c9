"""Rows that are read and gone on with: the same tokens in any cut, padding and company.

What they are compared with reads every sequence from its start for every token, by the model that
training uses, one prompt at a time.
"""

import functools
import itertools
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_run import nudged

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.models.generation import Generator, Request, Sampling
from deltaproduct_jax.models.generation.generator import collect
from deltaproduct_jax.models.generation.requests import fingerprint
from deltaproduct_jax.models.generation.rows import Rows
from deltaproduct_jax.models.generation.sampling import draw, row_keys, rules_of

VOCAB, ROOM = 11, 24
SAMPLINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(top_k=5, min_p=0.02),
]
# One whenever tests run, the others with --slow.
FAST = "gated_delta_product"
HYBRID = "hybrid"  # with every second block attention, and blocks run as a scan
ALL = [
    name if name == FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in (*MIXERS, HYBRID)
]


@functools.cache
def model_of(mixer):
    """A model whose next token depends on all before: no parameter is near its draw's 0."""
    sizes = {"hidden_size": 8, "num_heads": 2, "head_dim": 4, "intermediate_size": 8}
    layers = 2 if mixer in ("rwkv7", "transformer") else 1
    own = {"use_short_conv": True} if mixer == FAST else {}
    own |= {"max_length": ROOM} if mixer in ("transformer", HYBRID) else {}
    if mixer == HYBRID:
        mixer, layers = "delta_product", 4
        own |= {"attention_every": 2, "scan_layers": True}
    config = ModelConfig(vocab_size=VOCAB, mixer=mixer, num_layers=layers, **sizes, **own)
    return nudged(SequenceModel(config, rngs=nnx.Rngs(0)), 0.4)


@functools.cache
def next_token(mixer):
    """The token behind a row, from nothing but its tokens."""
    graph, params = nnx.split(model_of(mixer))

    @jax.jit
    def run(tokens, count, seed, own, rules):
        logits = nnx.merge(graph, params)(tokens)[:, count - 1]
        keys = row_keys(jax.random.key(seed), own[None], count[None])
        return draw(keys, logits, rules)[0]

    return run


def alone(mixer, prompt, count, sampling, seed, own):
    """What a prompt is gone on with, token by token, each from the start."""
    tokens = list(prompt)
    for _ in range(count):
        row = np.zeros((1, ROOM), np.int32)
        row[0, : len(tokens)] = tokens
        arguments = (row, np.int32(len(tokens)), np.uint32(seed), np.uint32(own))
        tokens.append(int(next_token(mixer)(*arguments, rules_of([sampling], VOCAB))))
    return tokens[len(prompt) :]


@functools.cache
def generator_of(mixer):
    """Two rows, so that a third prompt waits; pieces shorter than prompts."""
    return Generator(model_of(mixer), rows=2, pieces=(4,), stride=3)


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10)


@pytest.mark.parametrize("mixer", ALL)
def test_any_cut_padding_and_company_give_the_same_tokens(mixer):
    generator = generator_of(mixer)

    # A failure is shown as it is: making it small would take minutes.
    @settings(
        max_examples=6, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate]
    )
    @given(st.lists(prompts, min_size=3, max_size=3), st.integers(0, 99), st.data())
    def check(asked, seed, data):
        draw_one = lambda *options: data.draw(st.sampled_from(options))
        samplings = [draw_one(*SAMPLINGS) for _ in asked]
        counts = [data.draw(st.integers(1, 8)) for _ in asked]
        keys = [data.draw(st.integers(0, 2**32 - 1)) for _ in asked]
        want = [
            alone(mixer, *row, seed, key)
            for *row, key in zip(asked, counts, samplings, keys, strict=True)
        ]
        requests = []
        for prompt, count, sampling, key in zip(asked, counts, samplings, keys, strict=True):
            # What is read before is cut off anywhere, and once more.
            cuts = sorted(data.draw(st.integers(0, len(prompt))) for _ in range(2))
            prefix = None
            for start, stop in itertools.pairwise((0, *cuts)):
                prefix = generator.read(prompt[start:stop], prefix) if stop > start else prefix
            rest = prompt[cuts[-1] :]
            options = {"max_tokens": count, "sampling": sampling, "key": key}
            requests.append(Request(rest, prefix=prefix, **options))
        order = data.draw(st.permutations(range(3)))
        found = collect(generator.stream([requests[i] for i in order], seed=seed), 3)
        assert [found[order.index(i)].tokens for i in range(3)] == want
        padded, mask = _padded(asked, data)
        options = {"max_tokens": 3, "seed": seed, "keys": keys, "sampling": samplings[0]}
        found = generator.generate(padded, mask=mask, **options)
        want = [alone(mixer, p, 3, samplings[0], seed, k) for p, k in zip(asked, keys, strict=True)]
        assert [one.tokens for one in found] == want

    check()


def _padded(asked, data):
    """The prompts as an array with padding left, right, or anywhere."""
    width = 12
    padded = np.full((len(asked), width), VOCAB + 5)
    mask = np.zeros(padded.shape, bool)
    for row, prompt in enumerate(asked):
        n = len(prompt)
        anywhere = st.lists(st.integers(0, width - 1), min_size=n, max_size=n, unique=True)
        sides = (st.just(range(n)), st.just(range(width - n, width)), anywhere)
        places = sorted(data.draw(st.one_of(*sides)))
        padded[row, places], mask[row, places] = prompt, True
    return padded, mask


@pytest.mark.parametrize("mixer", ALL)
def test_a_row_is_kept_forked_and_put_back(mixer):
    """Where it stopped, as often as one likes, also from the host's memory."""
    generator, sampling = generator_of(mixer), SAMPLINGS[1]
    prompt = [3, 1, 4, 1, 5]
    whole = alone(mixer, prompt, 8, sampling, 5, 9)
    options = {"sampling": sampling, "key": 9}
    first = collect(generator.stream([Request(prompt, 4, keep=True, **options)], seed=5), 1)[0]
    assert first.tokens == whole[:4]
    assert first.prefix.length == 9
    saved = pickle.loads(pickle.dumps(jax.device_get(first.prefix)))
    for prefix in (first.prefix, saved):
        rest = [Request([], 4, prefix=prefix, **options)]
        rest += [Request([], 4, prefix=prefix, sampling=sampling, key=key) for key in (1, 2)]
        found = [one.tokens for one in collect(generator.stream(rest, seed=5), 3)]
        assert found[0] == whole[4:]
        for tokens, key in zip(found[1:], (1, 2), strict=True):
            assert tokens == alone(mixer, prompt + whole[:4], 4, sampling, 5, key)


@pytest.fixture(scope="module")
def generator():
    return generator_of(FAST)


def test_prompts_of_any_length_compile_a_few_programs(generator):
    programs = generator._programs
    generator.generate([[1] * 3, [2] * 5], max_tokens=2)
    sizes = lambda: [f._cache_size() for f in (programs.absorb, programs.decode, programs.put)]
    before = sizes()
    for length in range(1, 20):
        generator.generate([[1] * length, [2]] * 2, max_tokens=length, seed=length)
    assert sizes() == before
    assert before[0] <= 2


def test_pieces_of_several_sizes_read_the_same(generator):
    prompt, read = [int(x) for x in np.arange(19) % VOCAB], []
    want = generator.generate([prompt], max_tokens=5)[0].tokens
    other = Generator(model_of(FAST), rows=2, pieces=(4, 2), stride=3)
    programs = vars(other._programs)

    def absorb(params, state, tokens, mask):
        read.append(tokens.shape[1])
        return programs["absorb"](params, state, tokens, mask)

    other._programs = types.SimpleNamespace(**{**programs, "absorb": absorb})
    assert other.generate([prompt], max_tokens=5)[0].tokens == want
    assert read == [4, 4, 4, 4, 2]


def test_rows_that_end_are_filled_while_others_go_on(generator):
    requests = [Request([1, 2], n) for n in (20, 1, 2, 3, 4)]
    ends = [p.index for p in generator.stream(requests) if p.reason is not None]
    assert ends == [1, 2, 3, 4, 0]


def test_requests_are_asked_for_as_there_is_room(generator):
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield Request([1], 3)

    pieces = list(itertools.islice(generator.stream(endless()), 6))
    assert [p.index for p in pieces] == list(range(6))
    assert asked == 6


def test_a_stop_token_ends_a_row(generator):
    whole = generator.generate([[1, 2, 3]], max_tokens=12, sampling=SAMPLINGS[1], seed=3)[0]
    assert whole.reason == "length"
    stop = whole.tokens[4]
    options = {"max_tokens": 12, "sampling": SAMPLINGS[1], "seed": 3}
    found = generator.generate([[1, 2, 3]], stop_tokens=(0, stop), **options)[0]
    at = min(whole.tokens.index(t) for t in (0, stop) if t in whole.tokens)
    assert (found.tokens, found.reason) == (whole.tokens[: at + 1], "stop_token")


def letters(ids):
    return "".join("abcdefghijk"[i] for i in ids)


@pytest.fixture(scope="module")
def writer():
    return Generator(model_of(FAST), rows=2, pieces=(4,), stride=3, decode=letters)


def test_text_is_the_tokens_and_ends_at_a_stop_string(writer):
    prompt, same = [0, 1], {"sampling": SAMPLINGS[2], "key": 3}
    options = {"max_tokens": 30, "keep": True, **same}
    (whole,) = collect(writer.stream([Request(prompt, **options)]), 1)
    assert whole.text == letters(whole.tokens)
    stop = whole.text[13:16]
    at = whole.text.index(stop)
    pieces = list(writer.stream([Request(prompt, stop=(stop,), **options)]))
    (found,) = collect(pieces, 1)
    assert (found.text, found.reason) == (whole.text[:at], "stop_string")
    assert letters(found.tokens) == whole.text[:at] + stop
    assert len(pieces) > 1
    # What had only begun to be one at the end is text.
    begun = Request(prompt, stop=(whole.text[-2:] + "z",), **options)
    assert collect(writer.stream([begun]), 1)[0][:3] == whole[:3]
    # Gone on with, it is as if it had never stopped.
    count = len(found.tokens)
    assert found.prefix.length == len(prompt) + count
    (rest,) = collect(writer.stream([Request([], 30 - count, prefix=found.prefix, **same)]), 1)
    assert rest.tokens == whole.tokens[count:]


def test_text_is_without_the_stop_token(writer):
    options = {"max_tokens": 30, "sampling": SAMPLINGS[2]}
    whole = writer.generate([[0, 1]], **options)[0]
    stop = whole.tokens[9]
    found = writer.generate([[0, 1]], stop_tokens=(stop,), **options)[0]
    at = whole.tokens.index(stop)
    assert (found.text, found.tokens) == (whole.text[:at], whole.tokens[: at + 1])


def test_memory_stays_what_it_was(generator):
    """However much is written; what waits for its collection does not count."""
    pieces = generator.stream([Request([1, 2], None)])
    held = []
    for piece in itertools.islice(pieces, 40):
        assert len(piece.tokens) == 3
        held.append(sum(x.nbytes for x in jax.live_arrays()))
    assert held[-1] == held[1]
    pieces.close()


def test_rows_that_go_on_are_changed_in_place(generator, monkeypatch):
    """Or there would be two states of every row, which may be most of what a device holds."""
    programs, given = vars(generator._programs), []

    def watched(name):
        def call(*arguments, **options):
            rows = next(x for x in arguments if isinstance(x, Rows))
            given.append((name, jax.tree.leaves(rows)))
            return programs[name](*arguments, **options)

        return call

    ours = programs | {name: watched(name) for name in ("put", "decode")}
    monkeypatch.setattr(generator, "_programs", types.SimpleNamespace(**ours))
    generator.generate([[1, 2, 3]] * 3, max_tokens=3)
    assert {name for name, _ in given} == {"put", "decode"}
    assert all(x.is_deleted() for _, leaves in given for x in leaves)


def test_ids_beyond_the_tokenizers_are_never_drawn():
    generator = Generator(model_of(FAST), rows=2, pieces=(4,), stride=3, vocab_size=3)
    found = generator.generate([[1]], max_tokens=40, sampling=Sampling(temperature=5.0))[0]
    assert set(found.tokens) == {0, 1, 2}


def test_a_model_that_is_not_finite_ends_in_an_error():
    model = nnx.clone(model_of(FAST))
    model.lm_head.kernel.set_value(model.lm_head.kernel[...].at[0, 0].set(jnp.nan))
    with pytest.raises(FloatingPointError, match="logits behind 2 tokens of request 0 are not fin"):
        Generator(model, rows=2, pieces=(4,), stride=3).generate([[1, 2]])


def test_what_does_not_fit_is_named(generator, unchecked):
    ask = lambda **fields: list(generator.stream([Request(**({"prompt": [1]} | fields))]))
    for text, fields in {
        "prompt is empty; it must hold one token": {"prompt": []},
        "token 11 must be from 0 to below vocab_size=11": {"prompt": [1, 11]},
        "token -1 must be from 0": {"stop_tokens": (-1,)},
        "max_tokens=0 is too small": {"max_tokens": 0},
        "stop_tokens=.* are too many; 8 are the most": {"stop_tokens": tuple(range(9))},
        "needs a Generator with decode=": {"stop": ("x",)},
        "holds an empty string": {"stop": ("",)},
        "key=-1 must be from 0 to below": {"key": -1},
        "must be whole numbers in one dimension": {"prompt": [[1]]},
        r"prompt=\[0.5\] must be whole numbers": {"prompt": [0.5]},
    }.items():
        with pytest.raises(ConfigError, match=text):
            ask(**fields)
    for text, options in {
        "rows=0 is too small": {"rows": 0},
        "pieces=.* must descend": {"pieces": (2, 4)},
        "stride=0 is too small": {"stride": 0},
        "vocab_size=12 must be from 1 to the model's, 11": {"vocab_size": 12},
        "rows=2.0 must be a whole number": {"rows": 2.0},
        "stride=True must be a whole number": {"stride": True},
        r"pieces\[1\]=2.5 must be a whole number": {"pieces": [4, 2.5]},
        "decode='utf-8' must be a function": {"decode": "utf-8"},
    }.items():
        with pytest.raises(ConfigError, match=text):
            Generator(model_of(FAST), **options)
    with pytest.raises(ConfigError, match=r"^model=.* must be a SequenceModel"):
        Generator(nnx.split(model_of(FAST))[0])
    with pytest.raises(ConfigError, match="mask must be bool, of the prompts' shape"):
        generator.generate(np.ones((1, 2), int), mask=np.ones((1, 3), bool))
    with pytest.raises(ConfigError, match=r"keys=.* must be as many as the prompts, 1"):
        generator.generate([[1]], keys=[1, 2])


def test_a_fingerprint_is_of_every_bit():
    """Of every dtype and place: a model with one bit turned is another."""
    trees = [{"a": np.arange(3, dtype=np.uint8), "b": np.ones(2, jnp.bfloat16)}]
    for name, kind in (("a", np.uint8), ("b", np.uint16)):
        for place, bit in itertools.product(range(trees[0][name].size), range(8)):
            changed = trees[0][name].copy()
            changed.view(kind)[place] ^= 1 << bit
            trees.append(trees[0] | {name: changed})
    trees += [{"a": trees[0]["b"], "b": trees[0]["a"]}, {"b": trees[0]["b"]}]
    found = [fingerprint(jax.tree.map(jnp.asarray, tree)) for tree in trees]
    assert len(set(found)) == len(trees) == 43
    assert 2**40 < max(found) < 2**64


def test_what_a_stream_cannot_go_on_with_is_refused():
    generator = Generator(model_of(FAST))
    kept = generator.read([1, 2])
    # Two numbers of one matrix change places, which no sum of them shows.
    other = model_of(FAST)
    weights = other.embeddings.embedding[...]
    swapped = weights.at[0, :2].set(weights[0, 1::-1])
    other.embeddings.embedding[...] = swapped
    others = Generator(other).read([1, 2])
    for text, requests, seed in [
        ("seed=-3 must be from 0 to", [Request([1])], -3),
        ("seed=0.5 must be a whole number", [Request([1])], 0.5),
        ("requests=None must be several", None, 0),
        (r"requests\[0\]=\[1, 2\] must be a Request", [[1, 2]], 0),
        ("token 11 must be from 0 to below", [Request([1], prefix=kept._replace(token=11))], 0),
        ("prefix.token='a' must be a whole", [Request([1], prefix=kept._replace(token="a"))], 0),
        ("prefix.length=0 is too small", [Request([1], prefix=kept._replace(length=0))], 0),
        ("other parameters have read", [Request([1], prefix=others)], 0),
    ]:
        with pytest.raises(ConfigError, match=text):
            next(generator.stream(requests, seed=seed))
    wide = jax.tree.map(lambda x: x[..., :1], kept.state)
    for state, text in (
        (wide, r"prefix\.state\[0\]\.\w+ must be"),
        (None, r"prefix\.state must be a"),
    ):
        with pytest.raises(ValueError, match=text):
            generator.read([1], kept._replace(state=state))
    with pytest.raises(ConfigError, match="prompts=3 must be several"):
        generator.generate(3)


@pytest.mark.parametrize("count", [ROOM - 4, None])
def test_attention_that_has_no_room_is_an_error_before_anything_is_read(count):
    generator = Generator(model_of("transformer"))
    with pytest.raises(ConfigError, match=f"do not fit into max_length={ROOM}"):
        generator.generate([[1] * 6], max_tokens=count)
