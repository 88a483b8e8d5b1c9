"""Models of settings at random: what a configuration accepts can be built, run and saved.

Nothing is compiled: shapes alone say whether parts fit. Settings that make no sense are refused by
the configuration, in one line that names one of them, and never by what is built from it.
"""

import dataclasses
import json
import typing

import jax
import jax.numpy as jnp
import pytest
from campaign.damage import cases
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel, count_parameters
from deltaproduct_jax.parallel.names import names_of_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]

B, T = 2, 6
SMALL = st.integers(1, 4)
# By name where only some values are small enough to trace; the rest is drawn by type.
SIZES = {
    "vocab_size": st.integers(2, 9),
    "hidden_size": st.sampled_from([4, 8, 12]),
    "num_layers": st.integers(1, 3),
    "num_heads": SMALL,
    "num_v_heads": st.one_of(st.none(), SMALL),
    "head_dim": st.sampled_from([2, 4, 6]),
    "intermediate_size": st.one_of(st.none(), st.integers(1, 16)),
    "num_householder": SMALL,
    "expand_v": st.sampled_from([0.5, 1.0, 1.5, 2.0]),
    "conv_size": st.integers(1, 5),
    "max_length": st.one_of(st.none(), st.integers(1, 12)),
    "chunk_size": st.one_of(st.none(), st.integers(1, 8)),
    "remat": st.sampled_from(["none", "products", "blocks"]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "param_dtype": st.sampled_from(["float32", "bfloat16"]),
}
ODD = st.sampled_from([0, -1, 1.5, True, "8", "none", "", None, float("nan"), 10**30, (), [1]])


def drawn(field, hint):
    """A strategy for values that a field may well take."""
    if field.name in SIZES:
        return SIZES[field.name]
    options = typing.get_args(hint) or (hint,)
    if bool in options:
        return st.sampled_from([True, False, *([None] if type(None) in options else [])])
    return st.just(field.default)


HINTS = typing.get_type_hints(ModelConfig)
FIELDS = [f for f in dataclasses.fields(ModelConfig) if f.name != "mixer" and f.init]


@st.composite
def settings_of_models(draw):
    """A mixer and a few fields that differ from their defaults, all small."""
    base = {
        "vocab_size": 8, "hidden_size": 8, "num_heads": 2, "head_dim": 4, "num_layers": 1,
    }  # fmt: skip
    chosen = draw(st.lists(st.sampled_from(FIELDS), max_size=5, unique_by=lambda f: f.name))
    more = {field.name: draw(drawn(field, HINTS[field.name])) for field in chosen}
    return {"mixer": draw(st.sampled_from(sorted(MIXERS))), **base, **more}


def configured(fields):
    """The configuration, or None where it is refused in one line that names a field of it."""
    try:
        return ModelConfig(**fields)
    except ConfigError as error:
        text = str(error)
    assert "\n" not in text, text
    assert any(field.name in text for field in dataclasses.fields(ModelConfig)), text
    return None


@cases(120)
@given(fields=settings_of_models())
def test_what_is_accepted_can_be_built_and_run(fields):
    """Logits of all tokens; parameters that are counted, and have names of axes."""
    config = configured(fields)
    if config is None:
        return
    model = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model, nnx.Param)
    tokens = ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    run = lambda p, x, ids: nnx.merge(graph, p)(x, segment_ids=ids)
    logits = jax.eval_shape(run, params, tokens, ids)
    assert logits.shape == (B, T, config.vocab_size)
    assert jnp.issubdtype(logits.dtype, jnp.floating)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count_parameters(model)["total"] == total
    assert len(names_of_model(model)) == len(jax.tree.leaves(params))


@cases(120)
@given(fields=settings_of_models())
def test_a_configuration_is_json_and_comes_back(fields):
    config = configured(fields)
    if config is not None:
        saved = json.loads(json.dumps(dataclasses.asdict(config)))
        tuples = {name: tuple(x) if isinstance(x, list) else x for name, x in saved.items()}
        assert ModelConfig(**tuples) == config


@cases(300)
@given(fields=settings_of_models(), field=st.sampled_from(FIELDS), value=ODD)
def test_an_odd_value_is_refused_or_can_be_built(fields, field, value):
    """What has the wrong type is never taken for another value."""
    config = configured(fields | {field.name: value})
    if config is None:
        return
    kept = getattr(config, field.name)
    if type(kept) is float and type(value) is int:
        value = float(value)  # the nearest to it, of 10**30
    assert kept == value or kept is value or (kept, value) == ((), [])
    assert type(kept) is type(value) or {type(kept), type(value)} <= {int, float, tuple, list}
    if config.hidden_size < 100 and config.num_layers < 5:
        nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
