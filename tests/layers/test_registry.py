"""What every registered mixer has to bring; a new one fails here first, and is told what to add."""

import dataclasses
import inspect
import pickle
import re

import jax
import jax.numpy as jnp
import oracle_mixers
import pytest
from flax import nnx

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import RWKV7, GatedDeltaProduct
from deltaproduct_jax.layers.registry import MIXERS, RegisteredMixer, register_mixer
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.models.mixers import make_mixer

ORACLE = ["p", "x", "H", "K", "V", "eps", "extended"]  # what test_mixers.py calls it with


def missing(mixer: RegisteredMixer) -> str:
    """What a mixer lacks, empty if nothing."""
    oracle = getattr(oracle_mixers, mixer.name, None)
    if oracle is None:
        return (
            f"mixer {mixer.name!r} has no oracle: add {mixer.name}({', '.join(ORACLE)}) to "
            "tests/oracle_mixers.py, its layer as a loop over tokens in float64 NumPy"
        )
    if list(inspect.signature(oracle).parameters)[:7] != ORACLE:
        return f"the oracle of {mixer.name!r} must take {', '.join(ORACLE)} first"
    if not (mixer.layer.__doc__ or "").strip():
        return f"{mixer.layer.__name__} has no docstring"
    return ""


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_an_oracle(name):
    assert not missing(MIXERS[name])


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(MIXERS, "other", MIXERS["delta_net"])  # to be gone afterwards
    register_mixer("other", GatedDeltaProduct, state=MIXERS["delta_net"].state)
    assert "add other(p, x, H, K, V, eps, extended) to tests/oracle" in missing(MIXERS["other"])
    monkeypatch.setattr(oracle_mixers, "other", lambda p, x: x, raising=False)
    assert "must take p, x, H" in missing(MIXERS["other"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"defaults": {"expandv": 1.0}}, "defaults of mixer 'other': expandv is no keyword of the"),
        ({"fixed": {"gated": True, "head_dim": 4}}, "fixed of mixer 'other': gated is no keyword"),
        ({"fixed": ["head_dim"]}, "fixed of mixer 'other' must be values by keyword, got ['head_d"),
        ({"by_block": lambda block: {"number": block}}, "by_block(0) of mixer 'other': number is"),
        ({"by_block": lambda block: None}, "must be values by keyword, got None"),
    ],
)
def test_keywords_that_no_layer_takes_are_refused_at_once(given, says):
    """A default misspelt would do nothing; of other keywords Python would speak in a block."""
    with pytest.raises(ConfigError, match=re.escape(says)):
        register_mixer("other", GatedDeltaProduct, state=MIXERS["delta_net"].state, **given)
    assert "other" not in MIXERS


@pytest.mark.parametrize(
    ("leaf", "got"),
    [(0.0, "a float"), (jnp.zeros(()), "float32[]"), (jnp.zeros((16, 3)), "float32[16, 3]")],
)
def test_states_that_are_no_rows_are_named(leaf, got):
    class Odd(GatedDeltaProduct):
        def init_state(self, batch_size):
            return super().init_state(batch_size)._replace(recurrent=leaf)

    layer = nnx.eval_shape(lambda: Odd(8, num_heads=2, head_dim=4, rngs=nnx.Rngs(0)))
    says = f"Odd.init_state().recurrent must be an array of batch_size=2 rows, got {got}"
    with pytest.raises(ConfigError, match=re.escape(says)):
        layer.init_state(2)


@pytest.mark.parametrize("name", MIXERS)
def test_states_are_of_the_registered_class(name):
    config = ModelConfig(mixer=name, hidden_size=8, num_heads=2, head_dim=4)
    state = nnx.eval_shape(lambda: make_mixer(config, 0, nnx.Rngs(0)).init_state(3))
    assert type(state) is MIXERS[name].state
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_can_be_pickled(name):
    config = ModelConfig(mixer=name, hidden_size=8, num_heads=2, head_dim=4)
    if MIXERS[name].takes("use_short_conv"):
        config = dataclasses.replace(config, use_short_conv=True)
    mixer = nnx.eval_shape(lambda: make_mixer(config, 0, nnx.Rngs(0)))
    again = pickle.loads(pickle.dumps(mixer))
    assert nnx.split(again)[0] == nnx.split(mixer)[0]


def test_fields_that_a_layer_passes_on_to_its_parent_reach_it(monkeypatch):
    class Passing(RWKV7):
        """As RWKV-7, with one more keyword."""

        def __init__(self, hidden_size: int, *, num_layers: int = 7, **kwargs):
            super().__init__(hidden_size, **kwargs)

    monkeypatch.setitem(MIXERS, "passing", dataclasses.replace(MIXERS["rwkv7"], layer=Passing))
    register_mixer("passing", Passing, state=MIXERS["rwkv7"].state, fixed={"num_heads": 3})
    keywords = MIXERS["passing"].keywords
    want = MIXERS["rwkv7"].keywords | {"num_layers": 7, "value_residual": False}
    del want["num_heads"]
    assert keywords == want
