"""Hybrids: blocks of flash-linear-attention's that are softmax attention, both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative_error
from interop.golden_models import as_fork, assert_same_model, by_key, config, tensors, tiny, write
from oracle_mixers import transformer
from safetensors.numpy import load_file

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.interop import fla

ATTN = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 5}
ATTN |= {"rope_theta": 300.0}


def hybrid_of(name):
    """A model of the reference whose second layer is attention, as it writes one."""
    saved, content = config(name) | {"attn": ATTN, "max_position_embeddings": 24}, {}
    content = {k: x for k, x in tensors(name).items() if not k.startswith("model.layers.1.attn.")}
    rng, D = np.random.default_rng(0), saved["hidden_size"]
    widths = {"q": D, "k": D // 2, "v": D // 2, "o": D}
    for part, width in widths.items():
        key = f"model.layers.1.attn.{part}_proj"
        content[f"{key}.weight"] = rng.normal(0, D**-0.5, size=(width, D)).astype(np.float32)
        if part != "o":
            content[f"{key}.bias"] = rng.normal(size=width).astype(np.float32)
    return saved, content


def test_attention_between_is_theirs_and_written_as_it_was(tmp_path):
    saved, content = hybrid_of("b_ungated")
    model = fla.load(write(tmp_path / "theirs", saved, content), implementation="recurrent")
    assert model.config.attention_layers == (1,)
    assert model.layers[1].attn.max_length == 24
    its = {k.split(".attn.")[1]: x for k, x in content.items() if ".1.attn." in k}
    its = {k.replace("weight", "kernel"): x.T.astype(float) for k, x in its.items()}
    x = np.random.default_rng(1).normal(size=(9, saved["hidden_size"])).astype(np.float32)
    width = saved["hidden_size"] // 4
    want = transformer(its, x.astype(float), 4, width, width, 0, False, 2, 5, 300.0)
    found = jax.jit(lambda x: model.layers[1].attn(x)[0])(jnp.asarray(x[None]))
    assert relative_error(found[0], want) < 1e-5

    fla.save(model, tmp_path / "again")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert {k: x.tobytes() for k, x in written.items()} == {
        k: np.ascontiguousarray(x).tobytes() for k, x in content.items()
    }
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (again["attn"], again["max_position_embeddings"]) == (ATTN, 24)
    assert fla.load(tmp_path / "again", max_length=99).layers[1].attn.max_length == 99


def test_attention_of_the_fork_is_not_taken_apart(tmp_path):
    saved, content = as_fork("b_ungated")
    between = hybrid_of("b_ungated")[1]
    kept = {k: x for k, x in content.items() if not k.startswith("model.layers.1.attn.")}
    kept |= {k: x for k, x in between.items() if k.startswith("model.layers.1.attn.")}
    model = fla.load(write(tmp_path / "fork", saved | {"attn": ATTN}, kept))
    found = by_key(nnx.state(model, nnx.Param))
    assert {k: x.tobytes() for k, x in found.items()} == {
        k: np.ascontiguousarray(x).tobytes() for k, x in between.items()
    }


@pytest.mark.parametrize(
    "fields", [{"attention_every": 2}, {"attention_layers": (0,), "attention_heads": 1}]
)
def test_hybrids_of_ours_are_written_and_read(fields, tmp_path):
    model = tiny("gated_delta_product", max_length=12, window_size=7, **fields)
    fla.save(model, tmp_path / "m")
    other = fla.load(tmp_path / "m", implementation="recurrent")
    assert_same_model(model, other)
    kinds = [[type(block.attn) for block in each.layers] for each in (model, other)]
    assert kinds[0] == kinds[1]
    sizes = ("num_heads", "num_kv_heads", "head_dim", "max_length", "window_size", "rope_theta")
    at = model.config.attention_layers[0] if model.config.attention_layers else 1
    for name in sizes:
        assert len({getattr(each.layers[at].attn, name) for each in (model, other)}) == 1, name


REFUSED = {
    "attention nobody knows": ({"attn": ATTN | {"qk_norm": True}}, r"attn.qk_norm=True has no"),
    "attention nowhere": ({"attn": {"num_heads": 2}}, r"attn.layers is missing"),
    "attention in no layer": ({"attn": ATTN | {"layers": [5]}}, r"attn.layers=\[5\].*from 0 to 1"),
    "attention alone": ({"attn": ATTN | {"layers": [0, 1]}}, "leave a layer to the model's own"),
    "attention in a word": ({"attn": "all"}, "attn='all' must be an object"),
    "heads of no width": ({"attn": ATTN | {"num_heads": 5}}, r"attn.num_heads=5 must divide"),
    "groups of no size": ({"attn": ATTN | {"num_kv_heads": 3}}, "num_kv_heads=3 must divide the 4"),
    "a window of nothing": ({"attn": ATTN | {"window_size": 0}}, "window_size=0 is too small"),
}


@pytest.mark.parametrize(("changed", "says"), REFUSED.values(), ids=REFUSED)
def test_attention_without_a_counterpart_is_refused_by_name(changed, says, tmp_path):
    with pytest.raises(ConfigError, match=says) as caught:
        fla.load(write(tmp_path, config("a_gated") | changed, {}))
    assert "\n" not in str(caught.value)
