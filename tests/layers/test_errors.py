"""What a caller of a layer reads when an argument is wrong: its name, what it got, what it may be.

Every registered mixer is asked the same; a plug-in's stands among them. All on the user's path.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import (
    RWKV7,
    DeltaProductCell,
    GatedDeltaProduct,
    RecurrentMixer,
    RMSNorm,
    SequenceMixer,
    ShortConv,
    SoftmaxAttention,
    SwiGLU,
)
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.models.mixers import make_mixer

pytestmark = pytest.mark.usefixtures("unchecked")

B, T, D = 2, 5, 8


class MeanState(NamedTuple):
    mean: jax.Array


class Mean(RecurrentMixer[MeanState]):
    """Somebody's own mixer."""

    def __init__(self, hidden_size: int, *, horizon: float = 8.0, norm_eps: float = 1e-5, rngs):
        self.out = nnx.Linear(hidden_size, hidden_size, rngs=rngs)

    def init_state(self, batch_size):
        return MeanState(jnp.zeros((batch_size, self.out.in_features)))

    def _mix(self, x, state, segment_ids, length):
        return self.out(x), state

    def _token(self, x, state):
        return self.out(x), state


class Bare(SequenceMixer[MeanState]):
    """Another, which shares nothing but the interface."""

    def __init__(self, hidden_size: int, *, rngs: nnx.Rngs):
        self.width = hidden_size

    def init_state(self, batch_size):
        return MeanState(jnp.zeros((batch_size, self.width)))

    def __call__(self, x, *, state=None, segment_ids=None, mask=None):
        return x, self.init_state(x.shape[0]) if state is None else state

    def step(self, state, x):
        return x, state


PLUGINS = {"mean": Mean, "bare": Bare}


def shape_of(kind, *args, **kwargs):
    """A module without its parameters: what is refused comes to no arithmetic."""
    return nnx.eval_shape(lambda: kind(*args, **kwargs, rngs=nnx.Rngs(0)))


@functools.cache
def make(name: str, **fields):
    if name in PLUGINS:
        return shape_of(PLUGINS[name], D)
    config = ModelConfig(mixer=name, hidden_size=D, num_heads=2, head_dim=4, **fields)
    return shape_of(lambda rngs: make_mixer(config, 0, rngs))


LAYERS = [*MIXERS, *PLUGINS]
x = jnp.ones((B, T, D))


def refused(text, call, *args, kind=ValueError, **kwargs):
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


SEQUENCES = {
    "x is a list": ({"x": [1.0]}, "x must be a JAX or NumPy array, got list"),
    "no batch axis": (
        {"x": x[0]},
        "x must have 3 dimensions [B, T, D] with D=8, got 2: shape (5, 8)",
    ),
    "another width": ({"x": x[..., :7]}, "x must have shape [B, T, D] with D=8, got (2, 5, 7)"),
    "whole numbers": ({"x": x.astype(int)}, "x must have a dtype among bfloat16, float16"),
    "a shorter mask": (
        {"mask": jnp.ones((B, T - 1), bool)},
        "mask must have shape [B, T] with B=2, T=5, got (2, 4): T is 4 instead of 5",
    ),
    "a longer mask": ({"mask": jnp.ones((B, T + 1), bool)}, "T is 6 instead of 5"),
    "a mask of one row": ({"mask": np.ones((1, T), bool)}, "B is 1 instead of 2"),
    "a mask of numbers": (
        {"mask": jnp.ones((B, T), int)},
        "mask must have dtype bool, False at padding, got int32; mask != 0 makes it one",
    ),
    "ids that are floats": (
        {"segment_ids": jnp.zeros((B, T))},
        "segment_ids must have an integer dtype, got float32",
    ),
    "ids of one row": (
        {"segment_ids": np.zeros(T, int)},
        "segment_ids must have 2 dimensions [B, T] with B=2, T=5, got 1: shape (5,)",
    ),
    "a state that is an array": ({"state": x}, "as init_state makes it, got float32[2, 5, 8]"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_sequences(name):
    layer = make(name)
    for change, text in SEQUENCES.values():
        given = {"x": x} | change
        refused(text, layer, given.pop("x"), **given)
    state = layer.init_state(B)
    kind = type(state).__name__
    refused(f"state must be a {kind}", layer, x, state=tuple(state))
    more = layer.init_state(B + 1)
    refused("as init_state makes it for as many rows, got float32[3", layer, x, state=more)
    wrong = jax.tree.map(lambda a: a.astype(jnp.float16), state)
    refused("got float16[2", layer, x, state=wrong)


@pytest.mark.parametrize("name", LAYERS)
def test_one_token(name):
    layer = make(name)
    state = layer.init_state(B)
    refused("the state comes first, got float32[2, 8] before a ", layer.step, x[:, 0], state)
    refused("x must have 2 dimensions [B, D] with D=8, got 1", layer.step, state, x[0, 0])
    refused("x must have 2 dimensions [B, D] with D=8, got 3", layer.step, state, x)
    refused("with D=8, got (2, 3): D is 3", layer.step, state, x[:, 0, :3])
    refused("got float32[2", layer.step, state, x[:1, 0])
    for size in (-1, 2.0, True):
        refused(
            f"batch_size must be a whole number of at least 0, got {size}", layer.init_state, size
        )


def test_states_of_other_layers_and_sizes():
    layer = make("gated_delta_product", use_short_conv=True, expand_v=2.0)
    for other in ("mamba2", "transformer"):
        state = make(other).init_state(B)
        text = f"DeltaProductState, as init_state makes it, got a {type(state).__name__}"
        refused(f"state must be a {text}", layer, x, state=state)
    wider = make("gated_delta_product", use_short_conv=True, expand_v=4.0).init_state(B)
    refused(
        "state.recurrent must be float32[2, 2, 4, 8], as init_state makes it for as many rows, "
        "got float32[2, 2, 4, 16]",
        layer,
        x,
        state=wider,
    )
    bare = make("gated_delta_product", expand_v=2.0).init_state(B)
    refused("state.q_conv must be float32[2, 3, 8], as", layer.step, bare, x[:, 0])
    absent = bare._replace(q_conv=None)
    refused("state.q_conv must be a JAX or NumPy array, got NoneType", layer, x, state=absent)
    key = jax.random.key(0)
    refused("state must be a DeltaProductState, as init_state makes", layer, x, state=key)
    mlstm = make("mlstm")
    state = mlstm.init_state(B)
    inner = state._replace(recurrent=tuple(state.recurrent))
    refused("state must hold what a MLSTMLayerState of init_state holds", mlstm, x, state=inner)


ARGUMENTS = {
    "hidden_size=8.0 must be a whole number": {"hidden_size": 8.0},
    "hidden_size=True must be a whole number": {"hidden_size": True},
    "hidden_size=0 is too small; it must be at least 1": {"hidden_size": 0},
    "num_heads='2' must be a whole number": {"num_heads": "2"},
    "head_dim=4.0 must be a whole number": {"head_dim": 4.0},
    "norm_eps=-1 must be greater than 0": {"norm_eps": -1},
    "norm_eps=nan must be a finite number": {"norm_eps": float("nan")},
    "norm_eps=inf must be a finite number": {"norm_eps": float("inf")},
    "initializer_range=0 must be greater than 0": {"initializer_range": 0},
    "initializer='xavier' is not known; it may be one of ['paper', 'fla']": {
        "initializer": "xavier"
    },
    "dtype='int32' must be a dtype among bfloat16, float16, float32, float64": {"dtype": "int32"},
    "dtype='quite' must be a dtype among": {"dtype": "quite"},
    "param_dtype=None must be a dtype among": {"param_dtype": None},
    "num_v_heads=3 must be a positive multiple of num_heads=2": {"num_v_heads": 3},
    "num_v_heads=4.0 must be a whole number or none": {"num_v_heads": 4.0},
    "expand_v=nan must be a finite number": {"expand_v": float("nan")},
    "num_householder=-2 is too small": {"num_householder": -2},
    "allow_neg_eigval='false' must be true or false": {"allow_neg_eigval": "false"},
    "use_short_conv=1 must be true or false": {"use_short_conv": 1},
    "conv_size=0 is too small": {"conv_size": 0},
    "conv_size=2.5 must be a whole number": {"conv_size": 2.5},
    "max_length=16.0 must be a whole number": {"max_length": 16.0},
    "beta_bias='1' must be a finite number or none": {"beta_bias": "1"},
    "initial_gate=1.0 must be above 0": {"initial_gate": 1.0},
    "qk_activation='relu' is not known": {"qk_activation": "relu"},
    "implementation='zz' is not available; it may be one of": {"implementation": "zz"},
    "chunk_size must be at least 1, got -1": {"chunk_size": -1},
    "chunk_size=16 has no meaning for implementation='recurrent'": {
        "chunk_size": 16,
        "implementation": "recurrent",
    },
    "rngs=0 must be a Rngs": {"rngs": 0},
}


@pytest.mark.parametrize("kind", sorted({mixer.layer for mixer in MIXERS.values()}, key=str))
def test_arguments_of_constructors(kind):
    takes = next(m for m in MIXERS.values() if m.layer is kind).keywords
    takes = {*takes, "hidden_size", "rngs"}
    asked = 0
    for text, change in ARGUMENTS.items():
        if change.keys() <= takes:
            given = {"num_heads": 2, "head_dim": 4, "rngs": nnx.Rngs(0), "hidden_size": D} | change
            refused(text, kind, given.pop("hidden_size"), kind=ConfigError, **given)
            asked += 1
    assert asked >= 13


def test_arguments_of_other_constructors():
    rngs = nnx.Rngs(0)
    refused("horizon='8' must be a finite number", Mean, D, horizon="8", rngs=rngs)
    refused("norm_eps=0.0 must be greater than 0", Mean, D, norm_eps=0.0, rngs=rngs)
    refused(
        "norm_eps=1e-300 cannot be held in float32",
        Mean,
        D,
        norm_eps=1e-300,
        rngs=rngs,
        kind=ConfigError,
    )
    refused(
        "horizon=1e+39 cannot be held in float32",
        Mean,
        D,
        horizon=1e39,
        rngs=rngs,
        kind=ConfigError,
    )
    key = jax.random.key(0)
    refused("overlaying: [0 0] must be a Rngs", GatedDeltaProduct, D, rngs=key, kind=ConfigError)
    refused("hidden_size=-1 is too small", Bare, -1, rngs=rngs)
    refused("in_features=8.5 must be a whole number", DeltaProductCell, 8.5, rngs=rngs)
    refused("head_dim=0 is too small", DeltaProductCell, D, head_dim=0, rngs=rngs)
    refused("width=True must be a whole number", RMSNorm, True)
    refused("eps=-1.0 must be greater than 0", RMSNorm, D, eps=-1.0)
    refused("intermediate_size=0 is too small", SwiGLU, D, 0, rngs=rngs)
    refused("dtype='uint8' must be a dtype", SwiGLU, D, D, dtype="uint8", rngs=rngs)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'rngs'"):
        GatedDeltaProduct(D)
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        GatedDeltaProduct(D, heads=2, rngs=rngs)


def test_widths_of_other_layers():
    init = nnx.initializers.normal()
    refused("x must have a last axis of size 8, got shape (2, 5, 1)", RMSNorm(D), x[..., :1])
    refused("x must have a last axis of size 8", shape_of(SwiGLU, D, 4), x[..., :3])
    conv = shape_of(ShortConv, D, 3, activation=nnx.silu, kernel_init=init)
    given = {"activation": "relu", "kernel_init": init, "rngs": nnx.Rngs(0)}
    refused("activation='relu' is not known", ShortConv, D, kind=ConfigError, **given)
    refused("u must have a last axis of size 8", conv, x[..., :1], conv.init_state(B, x.dtype))
    refused("u must have dimensions [B, T, *channels], got shape (2, 8)", conv, x[:, 0], x)
    for state in (jnp.zeros((B, D, 2)), jnp.zeros((B, 3, D))):
        refused(
            f"state must have shape (2, 2, 8), as init_state makes it, got {state.shape}",
            conv,
            x,
            state,
        )
    refused("state must be a JAX or NumPy array, got NoneType", conv, x, None)
    cell = shape_of(DeltaProductCell, D, num_heads=2, head_dim=4)
    for shape in ((3, 7), (), 3, None, "ab", {2: 8}, np.array([2, 8])):
        text = f"input_shape={shape!r} must be a shape that ends in in_features=8"
        refused(text, cell.initialize_carry, shape, kind=ConfigError)
    for shape in ((-2, 8), (2.5, 8), (True, 8)):
        text = f"input_shape must be a whole number of at least 0, got {shape[0]}"
        refused(text, cell.initialize_carry, shape)
    carry = cell.initialize_carry((3, B, D))
    refused("inputs must have a last axis of size 8", cell, carry, x[..., :2])
    refused("carry.recurrent must be float32[2, 5, 2, 4, 8], as", cell, carry, x)
    refused("the state comes first, got float32[2, 5, 8] before a Delta", cell, x, carry)
    refused("x must have 3 dimensions [B, T, D]", cell.mixer.token_factors, x[0])


def test_what_is_right_passes_and_costs_nothing_under_jit():
    """NumPy arrays are taken; a program has the same equations with the checks as without them."""
    layer = make("gated_delta_product")
    read = {"segment_ids": np.zeros((B, T), np.int64), "mask": np.ones((B, T), bool)}
    state = jax.tree.map(np.asarray, layer.init_state(B))
    graph, params = nnx.split(layer)
    whole = lambda params: nnx.merge(graph, params)(np.ones((B, T, D)), state=state, **read)
    token = lambda params: nnx.merge(graph, params).step(state, np.ones((B, D)))
    y, after = jax.eval_shape(whole, params)
    assert y.shape == (B, T, D)
    y, after = jax.eval_shape(token, params)
    assert y.shape == (B, D)
    assert after.recurrent.shape == state.recurrent.shape
    plain = type(layer).step.__wrapped__
    programs = [
        jax.make_jaxpr(lambda p, s, x, f=f: f(nnx.merge(graph, p), s, x))(params, state, y)
        for f in (type(layer).step, plain)
    ]
    assert str(programs[0]) == str(programs[1])


def test_values_of_the_first_block():
    later = shape_of(RWKV7, D, num_heads=2, head_dim=4, value_residual=True)
    refused("mask must have dtype bool", later.values, x, mask=jnp.ones((B, T)))
    refused("v_first must be what values() of the model's first block returned", later, x)
    v = jnp.ones((B, T, 2, 4))
    refused("v_first must have shape [B, T, H, V] with B=2", later, x, v_first=v[:, :2])
    refused("v_first must have shape", later.step, later.init_state(B), x[:, 0], v_first=v)


def test_a_layer_takes_back_the_state_that_it_returns():
    """Whatever the dtype of the inputs."""
    for name in {mixer.layer: name for name, mixer in MIXERS.items()}.values():
        config = ModelConfig(mixer=name, hidden_size=D, num_heads=2, head_dim=4, dtype="bfloat16")

        def both(x, config=config):
            layer = make_mixer(config, 0, nnx.Rngs(0))
            _, state = layer(x)
            return layer.step(state, x[:, 0]), layer(x, state=state)

        jax.eval_shape(both, x)


def test_room_of_a_transformer():
    """Under jit the values are not known, and the outputs NaN: test_mixers.py."""
    layer = shape_of(SoftmaxAttention, D, num_heads=2, head_dim=4, max_length=3)
    holding = lambda *lengths: layer.init_state(B)._replace(length=jnp.array(lengths))
    refused(
        "state.length=[2, 3] leaves no room for what follows in max_length=3; make the layer with "
        "a larger max_length",
        layer.step,
        holding(2, 3),
        x[:, 0],
    )
    refused("state.length=[4, 0] leaves no room", layer, x, state=holding(4, 0))
    graph, params = nnx.split(layer)
    fits = lambda params: nnx.merge(graph, params).step(holding(2, 2), x[:, 0])
    full = lambda params: nnx.merge(graph, params)(x, state=holding(3, 3))  # for a new segment
    for call in (fits, full):
        assert jax.eval_shape(call, params)[0].shape[-1] == D


def test_models():
    config = ModelConfig(vocab_size=7, hidden_size=D, num_heads=2, head_dim=4, intermediate_size=8)
    model = shape_of(SequenceModel, config)
    ids, state = jnp.zeros((B, T), int), model.init_state(B)
    refused("tokens must have 2 dimensions [B, T], got 1: shape (5,)", model, ids[0])
    refused("tokens must have an integer dtype, got float32", model, x[..., 0])
    refused("tokens must be a JAX or NumPy array, got list", model, [[1, 2]])
    refused("mask must have shape [B, T] with B=2, T=5", model, ids, mask=jnp.ones((B, 4), bool))
    refused("mask must have dtype bool", model, ids, mask=ids)
    refused("segment_ids must have an integer dtype", model, ids, segment_ids=x[..., 0])
    refused("tokens must have 1 dimension [B], got 2", model.step, state, ids)
    text = "state must hold 1 of DeltaProductState, one per block, got ArrayImpl"
    refused(text, model.step, ids, ids[:, 0])
    refused(text, model.forward, ids, state=state[0].recurrent)
    refused("the state comes first, got int32[2] before a list", model.step, ids[:, 0], state)
    more = model.init_state(B + 1)
    refused("state[0].recurrent must be float32[2", model.forward, ids, state=more)
    refused("batch_size must be a whole number", model.init_state, 1.5)
    refused("config={} must be a ModelConfig", SequenceModel, {}, rngs=nnx.Rngs(0))
    refused("rngs=None must be a Rngs", SequenceModel, config, rngs=None)
