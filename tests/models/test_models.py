"""The sequence model: sizes of the published configurations, causality, decoding, packing."""

import dataclasses
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import quick

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import GatedDeltaProduct
from deltaproduct_jax.models import ModelConfig, SequenceModel, count_parameters

SMALL = ModelConfig(
    vocab_size=13, hidden_size=16, num_layers=2, num_heads=2, head_dim=4, intermediate_size=24
)
VARIANTS = {
    "plain": SMALL,
    "gated_conv": dataclasses.replace(
        SMALL, mixer="gated_delta_product", use_short_conv=True, use_output_gate=True
    ),
    "tied": dataclasses.replace(SMALL, tie_embeddings=True, num_householder=3, expand_v=2.0),
    "delta_net": dataclasses.replace(SMALL, mixer="delta_net"),
}


def tokens(B: int = 2, T: int = 9, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (B, T), 0, 13)


@nnx.jit
def run(model: SequenceModel, ids: jax.Array, **kwargs: jax.Array) -> jax.Array:
    return model(ids, **kwargs)


@nnx.jit
def step(model: SequenceModel, state: list, ids: jax.Array) -> tuple[jax.Array, list]:
    return model.step(state, ids)


def shape_of(config: ModelConfig) -> nnx.Module:
    """The model without any memory for its parameters."""
    return nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))


def test_state_tracking_models_have_the_published_sizes():
    # The paper's S5 models: d = 128, 8 heads of 32, one layer, 120 elements and 7 special tokens.
    config = ModelConfig(vocab_size=127, num_heads=8)
    counts = [
        count_parameters(shape_of(dataclasses.replace(config, num_householder=r)))["total"]
        for r in (1, 2, 3, 4)
    ]
    assert counts == [361_632, 428_192, 494_752, 561_312]


@pytest.mark.parametrize(
    ("d", "H", "n_h", "want"),
    [
        pytest.param(768, 8, 1, 213_802_752, marks=pytest.mark.slow),
        (736, 6, 2, 214_095_072),
        pytest.param(1024, 6, 3, 392_392_704, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_language_models_have_the_published_sizes(d, H, n_h, want):
    config = ModelConfig(
        hidden_size=d,
        num_layers=24,
        num_heads=H,
        head_dim=128,
        num_householder=n_h,
        use_short_conv=True,
        intermediate_size=None,
        tie_embeddings=True,
    )
    assert count_parameters(shape_of(config))["total"] == want


@pytest.mark.parametrize("variant", quick(VARIANTS, ["gated_conv"]))
def test_prompt_then_steps_agree_with_the_whole(variant):
    model = SequenceModel(VARIANTS[variant], rngs=nnx.Rngs(0))
    ids = tokens()
    logits = run(model, ids)
    assert logits.shape == (2, 9, 13)
    first, state = nnx.jit(lambda model, ids: model.forward(ids))(model, ids[:, :5])
    outputs = [first]
    for t in range(5, 9):
        out, state = step(model, state, ids[:, t])
        outputs.append(out[:, None])
    chex.assert_trees_all_close(jnp.concatenate(outputs, axis=1), logits, atol=2e-6)
    empty, _ = step(model, model.init_state(2), ids[:, 0])
    chex.assert_trees_all_close(empty, logits[:, 0], atol=2e-6)


@pytest.mark.parametrize("variant", ["plain", "gated_conv"])
def test_no_position_sees_a_later_token(variant):
    model = SequenceModel(VARIANTS[variant], rngs=nnx.Rngs(0))
    ids = tokens()
    changed = ids.at[0, 6].set((ids[0, 6] + 1) % 13)
    difference = jnp.abs(run(model, ids) - run(model, changed)).max(axis=2)
    assert not np.any(difference[0, :6])
    assert np.all(difference[0, 6:] > 0)
    assert not np.any(difference[1])  # nor anything of another row


def test_packed_rows_and_padding():
    model = SequenceModel(VARIANTS["gated_conv"], rngs=nnx.Rngs(0))
    ids = tokens(B=1)
    separate = jnp.concatenate([run(model, ids[:, :4]), run(model, ids[:, 4:])], axis=1)
    segments = jnp.array([[3] * 4 + [8] * 5], jnp.int32)
    packed = run(model, ids, segment_ids=segments)
    chex.assert_trees_all_close(packed, separate, atol=2e-6)
    padded = jnp.concatenate([jnp.zeros((1, 3), jnp.int32), ids], axis=1)
    mask = jnp.arange(12)[None] >= 3
    chex.assert_trees_all_close(run(model, padded, mask=mask)[:, 3:], run(model, ids), atol=2e-6)


def loss_with(remat: str, mixer: str):
    """A sum over packed rows, as a function of the parameters, and the parameters."""
    config = dataclasses.replace(SMALL, mixer=mixer, remat=remat)
    graphdef, params = nnx.split(SequenceModel(config, rngs=nnx.Rngs(0)))
    rows = {"segment_ids": (jnp.arange(64) >= 40).astype(jnp.int32)[None].repeat(2, axis=0)}
    ids = tokens(B=2, T=64)
    return lambda p: jnp.sum(nnx.merge(graphdef, p)(ids, **rows) ** 2), params


@pytest.mark.parametrize("mixer", quick(["delta_product", "rwkv7", "transformer"], ["transformer"]))
def test_what_is_computed_anew_is_not_kept(mixer):
    kept = {}
    for remat in ("none", "products", "blocks"):
        loss, params = loss_with(remat, mixer)
        backward = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        kept[remat] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
    assert kept["blocks"] < kept["products"] < 0.7 * kept["none"]


@pytest.mark.slow
def test_what_is_computed_anew_changes_no_gradient():
    def gradients(remat: str):
        loss, params = loss_with(remat, "delta_product")
        return jax.jit(jax.grad(loss))(params)

    want = gradients("none")
    for remat in ("products", "blocks"):
        chex.assert_trees_all_close(gradients(remat), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_every_field_reaches_the_model():
    """A field that changed neither parameters, their draw, nor the outputs would be dead."""
    # Each value differs from SMALL's; the second entry makes the field matter.
    conv, auto = {"use_short_conv": True}, {"intermediate_size": None}
    fla, cached = {"initializer": "fla"}, {"mixer": "transformer"}
    hybrid = {"num_layers": 2, "attention_layers": (1,)}
    changes = {
        "vocab_size": (17, {}), "mixer": ("gated_delta_product", {}), "hidden_size": (20, {}),
        "num_layers": (3, {}), "num_heads": (1, {}), "num_v_heads": (4, {}), "head_dim": (8, {}),
        "expand_v": (2.0, {}), "num_householder": (3, {}), "allow_neg_eigval": (False, {}),
        "qk_activation": ("none", {}), "beta_bias": (1.0, {}), "use_output_gate": (True, {}),
        "initial_gate": (0.7, {"mixer": "gated_delta_product"}),
        "use_short_conv": (True, {}), "conv_size": (2, conv), "max_length": (16, cached),
        "intermediate_size": (32, {}),
        "hidden_ratio": (40.0, auto), "norm_eps": (1e-2, {}), "tie_embeddings": (True, {}),
        "initializer": ("fla", {}), "initializer_range": (0.1, fla), "dtype": ("bfloat16", {}),
        "param_dtype": ("bfloat16", {}), "implementation": ("associative", {}),
        "chunk_size": (2, {"implementation": "chunked"}), "remat": ("products", {}),
        "scan_layers": (True, {"num_layers": 2}), "attention_every": (2, {"num_layers": 2}),
        "attention_layers": ((0,), {"num_layers": 2}), "attention_heads": (4, hybrid),
        "num_kv_heads": (1, hybrid), "qkv_bias": (True, hybrid), "window_size": (3, hybrid),
        "rope_theta": (100.0, hybrid),
    }  # fmt: skip
    # Seen in test_stack.py and in ops/kernels/: neither changes what is traced here.
    changed_elsewhere = {"saved_points", "conv_implementation"}
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(changes) == fields - changed_elsewhere
    ids = tokens()

    @functools.cache  # most fields have the same to differ from
    def program(config: ModelConfig) -> str:
        """Everything from the key to the logits: draws, their bounds, shapes, dtypes."""
        build = lambda key: SequenceModel(config, rngs=nnx.Rngs(key))(ids)
        return str(jax.make_jaxpr(build)(jax.random.key(0)))

    for name, (value, others) in changes.items():
        base = dataclasses.replace(SMALL, **others)
        assert program(base) != program(dataclasses.replace(base, **{name: value})), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mixer": "mamba"}, "mixer='mamba' is not known; it may be one of"),
        ({"mixer": ["rwkv7"]}, "mixer=['rwkv7'] must be a text"),
        (
            {"mixer": "delta_net", "num_householder": 2},
            "num_householder=2 does not fit mixer='delta_net'",
        ),
        ({"dtype": "float16"}, "dtype='float16' is not known"),
        (
            {"remat": "all"},
            "remat='all' is not known; it may be one of ['none', 'products', 'blocks', ",
        ),
        ({"hidden_size": 0}, "hidden_size=0 is too small; it must be at least 1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be greater than 0"),
        ({"num_v_heads": 3}, "num_v_heads=3 must be a positive multiple of num_heads=2"),
        ({"implementation": "cuda"}, "implementation='cuda' is not available; it may be one of"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"intermediate_size": 0}, "intermediate_size=0 is too small"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(change, text, unchecked):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(SMALL, **change)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_state_of_another_model_is_refused():
    model = SequenceModel(SMALL, rngs=nnx.Rngs(0))
    state = model.init_state(2)
    with pytest.raises(ValueError, match="state must hold 2 of DeltaProductState, one per block"):
        model.step(state[:1], tokens()[:, 0])
    with pytest.raises(ValueError, match="got \\['tuple', 'DeltaProductState'\\]"):
        model.forward(tokens(), state=[(), state[1]])


def test_the_model_says_where_it_starts_from_other_defaults_than_the_layer():
    config = ModelConfig(mixer="gated_delta_product")
    layer = inspect.signature(GatedDeltaProduct.__init__).parameters
    fields = [f.name for f in dataclasses.fields(config) if f.name in layer]
    dtypes = ("dtype", "param_dtype")
    other = {n for n in fields if n not in dtypes and config.value_of(n) != layer[n].default}
    assert other == {
        "hidden_size", "num_heads", "head_dim", "expand_v", "use_output_gate", "use_short_conv",
        "norm_eps",
    }  # fmt: skip
    for text in ("6 heads of 256", "4 heads of 32 in 128", "``expand_v`` 2", "``norm_eps`` 1e-5"):
        assert text in " ".join(ModelConfig.__doc__.split())


@pytest.mark.parametrize("bad", [-1, -13, 13, 2**31 - 1])
def test_an_id_that_is_none_is_nan_from_there_on(bad):
    """Counted from the end, -1 would look like a token."""
    model = SequenceModel(SMALL, rngs=nnx.Rngs(0))
    ids = tokens()
    got, whole = run(model, ids.at[0, 4].set(bad)), run(model, ids)
    assert np.isnan(got[0, 4:]).all()
    np.testing.assert_array_equal(got[0, :4], whole[0, :4])
    np.testing.assert_array_equal(got[1], whole[1])
