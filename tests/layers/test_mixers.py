"""Every mixer in the same model: steps, cuts, packing, padding, dtypes, fields; and that it learns.

The delta mixers are one layer, which test_layers.py and test_models.py compare in the same ways;
here they stand beside the baselines where the choice of a mixer is what matters. What is compared
runs in float64, so that a bar of 1e-10 tells rounding from a mistake.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle_mixers
import pytest
from flax import nnx
from helpers import relative_error
from quick import quick
from tiny_run import nudged

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import GatedDeltaProduct, KimiDeltaAttention
from deltaproduct_jax.layers.attention import rotate
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.models.config import MIXER_FIELDS
from deltaproduct_jax.models.mixers import make_mixer
from experiments import state_tracking
from experiments.lib import flags

B, T, VOCAB = 3, 11, 13
BASELINES = [name for name, mixer in MIXERS.items() if mixer.layer is not GatedDeltaProduct]
# Attention with all that the models of flash-linear-attention may have.
GROUPED = "transformer, grouped"
OF_GROUPED = {"num_kv_heads": 1, "qkv_bias": True, "window_size": 5, "rope_theta": 300.0}


class WideConfig(ModelConfig):
    """A configuration whose model computes in float64."""

    @property
    def jax_dtypes(self):
        return {"dtype": jnp.dtype("float64"), "param_dtype": jnp.dtype("float64")}


def config_of(mixer: str, kind=ModelConfig, **fields) -> ModelConfig:
    """Two layers where something passes between them."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_heads": 2, "head_dim": 8,
        "intermediate_size": 16, "num_layers": 2 if mixer == "rwkv7" else 1,
    }  # fmt: skip
    own = {"max_length": 16} if mixer in ("transformer", GROUPED) else {}
    own |= OF_GROUPED if mixer == GROUPED else {}
    return kind(mixer="transformer" if mixer == GROUPED else mixer, **(sizes | own | fields))


def lively(config: ModelConfig) -> SequenceModel:
    """A model none of whose parameters rests at 0, as some do before training."""
    return nudged(SequenceModel(config, rngs=nnx.Rngs(0)))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@functools.cache
def wide_model(mixer: str) -> SequenceModel:
    with jax.enable_x64(True):
        return lively(config_of(mixer, WideConfig))


# Layers of one class: what is fast of them is that of two which hold all of it.
KIMI = [m for m in BASELINES if issubclass(MIXERS[m].layer, KimiDeltaAttention)]
CHUNKED = [m for m in BASELINES if MIXERS[m].takes("implementation")]
RANGES = [(m, False) for m in (*MIXERS, GROUPED)]
RANGES += [(m, True) for m, mixer in MIXERS.items() if mixer.takes("allow_neg_eigval")]
FAST = [(m, extended) for m, extended in RANGES if m not in KIMI or (extended and m in KIMI[1:])]


@pytest.mark.parametrize(("mixer", "extended"), quick(RANGES, FAST, unpack=True))
def test_the_layer_is_the_published_one(mixer, extended, x64):
    """Against a loop over tokens, every parameter drawn at random."""
    kind = config_of(mixer).registered
    wide = {"expand_v": 1.5} if kind.takes("expand_v") else {}
    wide |= {"num_v_heads": 4} if kind.takes("num_v_heads") else {}
    if kind.takes("use_short_conv"):
        wide |= {"use_short_conv": True, "use_output_gate": True, "beta_bias": 0.5}
    config = config_of(mixer, WideConfig, allow_neg_eigval=extended, norm_eps=1e-3, **wide)
    layer = make_mixer(config, 1, nnx.Rngs(0))  # of a later block: RWKV-7's with value residual
    rng = np.random.default_rng(2)
    nudge = lambda a: jnp.asarray(np.asarray(a) + 0.3 * rng.normal(size=a.shape), a.dtype)
    params = jax.tree.map(nudge, nnx.state(layer, nnx.Param))
    nnx.update(layer, params)
    names = {
        ".".join(path): np.asarray(leaf[...], float) for path, leaf in nnx.to_flat_state(params)
    }
    x = rng.normal(size=(1, 21, 16))
    V = round(8 * wide.get("expand_v", 1))
    extra = {"v_first": rng.normal(size=(1, 21, 2, V))} if mixer == "rwkv7" else {}
    own = {"Hk": 1, "window": 5, "theta": 300.0} if mixer == GROUPED else {}
    want = getattr(oracle_mixers, kind.name)(
        names, x[0], 2, 8, V, 1e-3, extended, **{n: a[0] for n, a in extra.items()}, **own
    )
    run = nnx.jit(lambda layer, x, extra: layer(x, **extra)[0])
    got = run(layer, jnp.asarray(x), jax.tree.map(jnp.asarray, extra))
    assert relative_error(got[0], want) <= 1e-10


def tokens(seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (B, T), 0, VOCAB)


@nnx.jit
def forward(model, ids, segment_ids, mask, state):
    return model.forward(ids, segment_ids=segment_ids, mask=mask, state=state)


@nnx.jit
def forward_plain(model, ids):
    return model.forward(ids)


TRACES = []


@nnx.jit
def step(model, state, ids):
    TRACES.append(model)
    return model.step(state, ids)


def choose(use, a, b):
    pick = lambda a, b: jnp.where(use.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    return jax.tree.map(pick, a, b)


def by_steps(model, ids, state, keep, new):
    """Logits and state when rows are read token by token.

    Tokens where ``keep [B, T]`` is False are left out; the state is dropped before a token where
    ``new [B, T]`` is True.
    """
    empty, outputs = model.init_state(B), []
    for t in range(T):
        state = choose(new[:, t], empty, state)
        logits, after = step(model, state, ids[:, t])
        state = choose(keep[:, t], after, state)
        outputs.append(logits)
    return jnp.stack(outputs, axis=1), state


def agree(got, want, bar: float = 1e-10) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) <= bar


# Row 0 holds pieces of 3, 1 and 7 tokens, and its first id returns; row 1 is one piece; row 2 is
# all short pieces.
SEGMENTS = np.array([[5] * 3 + [2] + [5] * 7, [1] * 11, [0, 0, 1, 1, 0, 2, 3, 3, 3, 9, 9]])
NONE, ALL = np.zeros((B, T), int), np.ones((B, T), bool)
# Padding in front, anywhere, everywhere.
MASK = np.array([[0] * 4 + [1] * 7, [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], [0] * 11], bool)


# Whose programs are compiled in the ordinary tests; the three that follow share them.
WIDE = (GROUPED, "mamba2")
COMPARED = [*BASELINES, GROUPED]


@pytest.mark.parametrize("mixer", quick(COMPARED, WIDE))
def test_steps_and_pieces_agree_with_the_whole(mixer, x64):
    model, ids = wide_model(mixer), tokens()
    whole = forward_plain(model, ids)
    traced = len(TRACES)
    agree(by_steps(model, ids, model.init_state(B), ALL, NONE), whole)
    assert len(TRACES) <= traced + 1  # one program, however long the past
    first = np.arange(T)[None] < [[4], [9], [0]]
    head, state = forward(model, ids, NONE, first, model.init_state(B))
    tail, state = forward(model, ids, NONE, ~first, state)
    agree((jnp.where(first[..., None], head, tail), state), whole)
    prompt = forward_plain(model, ids[:, :5])[1]
    keep = np.broadcast_to(np.arange(T) >= 5, (B, T))
    agree(by_steps(model, ids, prompt, keep, NONE)[1], whole[1])


@pytest.mark.parametrize("mask", [ALL, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("mixer", quick(COMPARED, WIDE))
def test_segments_share_nothing_and_padding_is_skipped(mixer, mask, x64):
    model, ids, new = wide_model(mixer), tokens(), np.zeros((B, T), bool)
    start = forward_plain(model, tokens(seed=1)[:, :5])[1]
    for row in range(B):
        kept = SEGMENTS[row, mask[row]]
        new[row, mask[row]] = np.diff(kept, prepend=kept[:1]) != 0
    logits, state = forward(model, ids, SEGMENTS, mask, start)
    want, want_state = by_steps(model, ids, start, mask, new)
    agree((logits[mask], state), (want[mask], want_state))
    other, other_state = forward(model, jnp.where(mask, ids, 0), SEGMENTS, mask, start)
    agree((other[mask], other_state), (logits[mask], state), 0)


@pytest.mark.parametrize("mixer", quick(COMPARED, WIDE))
def test_no_position_sees_a_later_token_or_another_row(mixer, x64):
    ids = tokens()
    changed = ids.at[0, 6].set((ids[0, 6] + 1) % VOCAB)
    ours, theirs = (forward_plain(wide_model(mixer), x)[0] for x in (ids, changed))
    difference = np.abs(ours - theirs).max(axis=2)
    assert np.all(difference[0, :6] < 1e-13)
    assert np.all(difference[0, 6:] > 1e-9)
    assert not np.any(difference[1:])


@pytest.mark.parametrize("mixer", quick(CHUNKED, ["gla", "rwkv7"]))
def test_chunked_layers_agree_with_recurrent_ones(mixer, x64):
    config = config_of(mixer, WideConfig, implementation="recurrent")
    want = forward_plain(lively(config), tokens())
    agree(forward_plain(wide_model(mixer), tokens()), want)


@nnx.jit
def descend(model, ids, rate):
    """One step against the sign of the gradient; the loss before it, and the gradient."""

    def loss(model):
        logits = jax.nn.log_softmax(model(ids).astype(jnp.float32))
        # Repeat the first token: its id has to be carried to every position.
        wanted = jax.nn.one_hot(jnp.broadcast_to(ids[:, :1], ids.shape), VOCAB)
        return -jnp.mean(jnp.sum(logits * wanted, axis=-1))

    value, gradients = nnx.value_and_grad(loss)(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - rate * jnp.sign(g), params, gradients))
    return value, gradients


@pytest.mark.parametrize("mixer", quick(MIXERS, ["gated_delta_product", "slstm"]))
def test_it_learns_and_large_weights_leave_gradients_finite(mixer):
    model, ids = SequenceModel(config_of(mixer, num_layers=1), rngs=nnx.Rngs(0)), tokens()
    losses = [descend(model, ids, 0.02 * 0.9**n)[0] for n in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    nnx.update(model, jax.tree.map(lambda p: 30 * p, nnx.state(model, nnx.Param)))
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(descend(model, ids, 0.0)))


@pytest.mark.parametrize("mixer", quick(BASELINES, ["mamba2"]))
def test_bfloat16_stays_near_and_keeps_a_wide_state(mixer):
    narrow = lively(config_of(mixer, dtype="bfloat16"))
    logits, state = forward_plain(narrow, tokens())
    assert logits.dtype == jnp.bfloat16
    for name, entry in state[0]._asdict().items():
        of_inputs = name.endswith("conv") or name in ("last", "k", "v", "length")  # as read
        assert of_inputs or all(a.dtype == jnp.float32 for a in jax.tree.leaves(entry)), name
    want = forward_plain(lively(config_of(mixer)), tokens())[0]
    assert 0 < relative_error(logits, want) < 5e-2


# What a baseline has for itself, changed; and what all of them share.
OWN = {
    "num_v_heads": 4, "expand_v": 2.0, "allow_neg_eigval": False, "conv_size": 3, "max_length": 8,
    "implementation": "recurrent", "chunk_size": 4, "qk_activation": "none", "beta_bias": 1.0,
    "initial_gate": 0.7, "use_output_gate": True, "use_short_conv": False, **OF_GROUPED,
}  # fmt: skip
SHARED = {"hidden_size": 20, "num_heads": 4, "head_dim": 4, "initializer": "fla"}


def program(config: ModelConfig) -> str:
    """Everything from the key to the outputs of the second block's mixer: draws, shapes, dtypes."""

    def build(key):
        x = jnp.zeros((1, 6, config.hidden_size), config.jax_dtypes["dtype"])
        return make_mixer(config, 0, nnx.Rngs(key))(x)

    return str(jax.make_jaxpr(build)(jax.random.key(0)))


@pytest.mark.parametrize("mixer", quick(BASELINES, ["slstm"]))
def test_every_field_that_a_mixer_has_reaches_it(mixer):
    convolved = {"use_short_conv": True} if MIXERS[mixer].takes("use_short_conv") else {}
    base = config_of(mixer, **convolved)
    known = program(base)
    own = {name: value for name, value in OWN.items() if MIXERS[mixer].takes(name)}
    assert own.keys() | SHARED.keys() >= {n for n in MIXER_FIELDS if MIXERS[mixer].takes(n)}
    for name, value in (own | SHARED).items():
        assert program(dataclasses.replace(base, **{name: value})) != known, name
    if mixer != "transformer":
        assert program(dataclasses.replace(base, norm_eps=0.5)) != known


# Given, be it what the field is anyway where a mixer has it.
GIVEN = OWN | {
    "num_householder": 1, "allow_neg_eigval": True, "qk_activation": "silu", "beta_bias": 1.0,
    "initial_gate": 0.9, "use_output_gate": False, "use_short_conv": True, "expand_v": 1.0,
    "conv_size": 4, "max_length": 2048, "conv_implementation": "plain",
}  # fmt: skip


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_field_that_a_mixer_lacks_is_one_clear_error(mixer):
    assert GIVEN.keys() | {"num_heads", "head_dim"} == set(MIXER_FIELDS)
    for name, value in GIVEN.items():
        if MIXERS[mixer].takes(name):
            continue
        with pytest.raises(ConfigError) as caught:
            config_of(mixer, **{name: value})
        text = str(caught.value)
        assert f"{name}={value!r} does not fit mixer={mixer!r}, which has no such" in text
        assert "\n" not in text


@pytest.mark.parametrize(
    ("mixer", "change", "text"),
    [
        ("transformer", {"head_dim": 5}, "head_dim=5 must be even"),
        ("mlstm", {"head_dim": 3}, "num_heads=2 times head_dim=3 must be a multiple of 4"),
        ("transformer", {"max_length": 0}, "max_length=0 is too small"),
        ("transformer", {"num_kv_heads": 3}, "num_kv_heads=3 must divide the 2 heads"),
        ("transformer", {"window_size": 0}, "window_size=0 is too small"),
        ("transformer", {"rope_theta": 0.0}, "rope_theta=0.0 must be greater than 0"),
        ("delta_net", {"conv_size": 4}, "conv_size=4 means nothing without use_short_conv"),
        ("mamba2", {"num_v_heads": 3}, "num_v_heads=3 must be a positive multiple of num_heads=2"),
        ("gla", {"implementation": "associative"}, "implementation='associative' is not available"),
        ("gla", {"implementation": "recurrent", "chunk_size": 4}, "chunk_size=4 has no meaning"),
        ("delta_net", {"num_householder": 2}, "num_householder=2 does not fit mixer='delta_net'"),
        ("gla", {"initial_gate": 1.0}, "initial_gate=1.0 must be above 0 and below 1, or none"),
        ("rwkv7", {"initial_gate": 0.5}, "initial_gate=0.5 must be above 0.5452 and below 1"),
    ],
)
def test_a_wrong_value_is_one_clear_error(mixer, change, text):
    with pytest.raises(ConfigError, match=text):
        config_of(mixer, **change)


def test_none_stands_for_the_mixers_own_choice():
    factors = {m: config_of(m).value_of("num_householder") for m in MIXERS if m not in BASELINES}
    assert factors == {m: 1 if m.endswith("delta_net") else 2 for m in factors}
    extended = {m for m in MIXERS if config_of(m).value_of("allow_neg_eigval")}
    assert extended == set(MIXERS) - {"transformer", "mlstm", "slstm"}
    for mixer in ("gla", "slstm"):
        assert config_of(mixer, allow_neg_eigval=False).value_of("allow_neg_eigval") is False


def test_a_full_cache_says_so():
    """Three tokens fit; a fourth turns the row's outputs into NaN, and not those of the other."""
    model = SequenceModel(config_of("transformer", max_length=3), rngs=nnx.Rngs(0))
    ids = jnp.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    assert np.all(np.isfinite(forward_plain(model, ids)[0]))  # whole sequences need no cache
    mask = jnp.arange(5)[None] < jnp.array([[3], [2]])
    state = forward(model, ids, ids * 0, mask, model.init_state(2))[1]
    logits, state = step(model, state, ids[:, 0])
    assert np.isnan(logits).all(axis=1).tolist() == [True, False]
    assert np.all(np.isfinite(logits[1]))
    state = forward_plain(model, ids)[1]
    assert np.all(np.isnan(step(model, state, ids[:, 0])[0]))


def test_rotary_positions_are_relative():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at = lambda x, position: rotate(x, jnp.array([[position]]))
    products = [jnp.sum(at(q, 7 + offset) * at(k, 3 + offset)) for offset in (0, 5, 90)]
    np.testing.assert_allclose(products, products[0], rtol=1e-5)
    assert abs(jnp.sum(at(q, 7) * at(k, 4)) - products[0]) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 50)), jnp.linalg.norm(q), rtol=1e-6)


def configure(*argv: str) -> ModelConfig:
    argv = ["--workdir=w", *argv]
    sections = flags.parse(
        argv, state_tracking.SECTIONS, state_tracking.PRESETS, exclude=["vocab_size"]
    ).sections
    return state_tracking.configure(sections).model


@pytest.mark.parametrize("preset", state_tracking.PRESETS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_presets_serve_every_mixer(mixer, preset):
    """What a preset says of fields that a mixer lacks is left out; a flag is not."""
    model = configure(f"--preset={preset}", f"--mixer={mixer}")
    assert model.mixer == mixer
    assert model.hidden_size == state_tracking.PRESETS[preset]["hidden_size"]
    if mixer in BASELINES:
        assert model.num_householder is None
        with pytest.raises(ConfigError, match="num_householder=2 does not fit"):
            configure(f"--preset={preset}", f"--mixer={mixer}", "--num_householder=2")
    else:
        assert model.qk_activation == state_tracking.PRESETS[preset]["qk_activation"]
        assert configure(f"--mixer={mixer}", "--num_householder=1").num_householder == 1


def test_flags_of_optional_bools():
    for text, value in (
        ("--allow_neg_eigval", True),
        ("--noallow_neg_eigval", False),
        ("--allow_neg_eigval=false", False),
        ("--allow_neg_eigval=none", None),
    ):
        assert configure(text).allow_neg_eigval is value
    assert configure().allow_neg_eigval is None
