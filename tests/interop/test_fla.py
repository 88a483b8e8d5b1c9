"""Models of flash-linear-attention: read, they are the same functions; written again, the same."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import IMPLEMENTATIONS, relative_error
from interop.golden_models import (
    FOLDERS,
    NAMES,
    as_fork,
    assert_same_model,
    by_key,
    config,
    golden,
    tensors,
    tiny,
    write,
)
from safetensors import safe_open
from safetensors.numpy import load_file

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import make_mesh

BAR = 1e-5
MIXERS = ("delta_product", "gated_delta_product", "delta_net", "gated_delta_net")


def with_hidden_states(model, tokens):
    """Logits, and what the reference calls hidden states."""
    x = model.embeddings(tokens)
    states = [x]
    for block in model.layers:
        x, _ = block(x)
        states.append(x)
    states[-1] = model.norm(x)
    return model(tokens), states


def loss_of(model, tokens, labels):
    """The reference's: the labels shifted by one, without those of -100."""
    logits, labels = model(tokens)[:, :-1], labels[:, 1:]
    counted = labels != -100
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0))
    return jnp.sum(losses, where=counted) / jnp.sum(counted)


def assert_near(pairs):
    far = {name: relative_error(*pair) for name, pair in pairs.items()}
    far = {name: error for name, error in far.items() if not error <= BAR}
    assert not far


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize("name", ["a_gated"])
def test_logits(name):
    model = fla.load(FOLDERS / name, implementation="recurrent")
    tokens = jnp.asarray(golden(name)["input_ids"], jnp.int32)
    assert_near({"logits": (jax.jit(lambda: model(tokens))(), golden(name)["logits"])})


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "pallas_tpu", None])
def test_every_implementation_is_the_reference(name, implementation):
    stored = golden(name)
    model = fla.load(FOLDERS / name, implementation=implementation)
    tokens = jnp.asarray(stored["input_ids"], jnp.int32)
    labels = jnp.asarray(stored["labels"], jnp.int32)
    (loss, gradients) = nnx.jit(nnx.value_and_grad(loss_of))(model, tokens, labels)
    pairs = {"loss": (loss, stored["loss"])}
    gradients = by_key(gradients)
    kept = [key for key in stored if key.startswith("grad/")]
    assert len(kept) > 10
    pairs |= {key: (gradients[key.removeprefix("grad/")], stored[key]) for key in kept}

    logits, states = jax.jit(lambda: with_hidden_states(model, tokens))()
    pairs["logits"] = logits, stored["logits"]
    pairs |= {f"hidden_states/{i}": (x, stored[f"hidden_states/{i}"]) for i, x in enumerate(states)}
    pairs |= decoded(model, tokens, stored)

    mask = jnp.asarray(stored["attention_mask"], bool)
    padded = jax.jit(lambda: model(tokens, mask=mask))()
    pairs["logits_leftpad"] = jnp.where(mask[..., None], padded, 0), stored["logits_leftpad"]

    bounds = stored["cu_seqlens"]
    segment_ids = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))[None]
    packed = jax.jit(lambda: model(tokens[:1], segment_ids=jnp.asarray(segment_ids)))()
    pairs["logits_packed"] = packed, stored["logits_packed"]
    assert_near(pairs)


def decoded(model, tokens, stored):
    """Logits token by token, and the caches after the last."""

    def step(state, token):
        logits, state = model.step(state, token)
        return state, logits

    state, logits = jax.jit(lambda: jax.lax.scan(step, model.init_state(2), tokens.T))()
    pairs = {"logits_step": (jnp.swapaxes(logits, 0, 1), stored["logits_step"])}
    for layer, entry in enumerate(state):
        cache = f"cache/{layer}/recurrent_state"
        pairs[cache] = entry.recurrent, stored[cache]
        for part in "qkv":
            # Theirs holds the current token too, which its own next step no longer reads.
            theirs = stored[f"cache/{layer}/conv_state_{part}"][..., 1:]
            tail = getattr(entry, f"{part}_conv")
            pairs[f"{cache} {part}"] = jnp.swapaxes(tail, 1, 2), theirs
    return pairs


def test_written_again_tensors_are_the_same_bit_by_bit(name, tmp_path):
    fla.save(fla.load(FOLDERS / name), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors(name).keys()
    for key, tensor in tensors(name).items():
        assert written[key].dtype == tensor.dtype
        assert np.array_equal(written[key], tensor)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    saved, theirs = json.loads((tmp_path / "config.json").read_text()), config(name)
    assert saved.pop("intermediate_size") == (theirs.pop("intermediate_size") or 256)
    assert {key: theirs.get(key, saved[key]) for key in saved} == saved


def test_the_fork_of_the_paper_is_the_same_model(name, tmp_path):
    model = fla.load(write(tmp_path / "fork", *as_fork(name)))
    assert model.config.use_output_gate is config(name)["use_output_gate"]
    fla.save(model, tmp_path / "today")
    written = load_file(tmp_path / "today" / "model.safetensors")
    assert written.keys() == tensors(name).keys()
    for key, tensor in tensors(name).items():
        assert np.array_equal(written[key], tensor), key


def test_bfloat16_stays_unless_asked(tmp_path):
    rounded = {k: x.astype(ml_dtypes.bfloat16) for k, x in tensors("a_gated").items()}
    rounded["model.layers.0.attn.A_log"] = tensors("a_gated")["model.layers.0.attn.A_log"]
    folder = write(tmp_path / "half", config("a_gated"), rounded)
    model = fla.load(folder)
    assert model.config.param_dtype == model.config.dtype == "bfloat16"
    fla.save(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "again" / "model.safetensors", "numpy") as file:
        for key, tensor in rounded.items():
            assert file.get_tensor(key).tobytes() == tensor.tobytes()
    wide = fla.load(folder, param_dtype="float32")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(wide, nnx.Param))} == {np.dtype("float32")}
    assert wide.config.dtype == "float32"
    narrow = by_key(nnx.state(fla.load(FOLDERS / "a_gated", param_dtype="bfloat16"), nnx.Param))
    assert {str(x.dtype) for key, x in narrow.items() if key.endswith(("A_log", "dt_bias"))} == {
        "float32"
    }
    norm = "model.norm.weight"
    assert narrow[norm].tobytes() == rounded[norm].tobytes()


def test_float16_is_converted_when_asked(tmp_path):
    half = {key: x.astype(np.float16) for key, x in tensors("b_ungated").items()}
    folder = write(tmp_path, config("b_ungated"), half)
    with pytest.raises(ConfigError, match=r"param_dtype is not given.*F16.*float32 or bfloat16"):
        fla.load(folder)
    found = by_key(nnx.state(fla.load(folder, param_dtype="float32"), nnx.Param))
    assert all(np.array_equal(found[key], x.astype(np.float32)) for key, x in half.items())


@pytest.mark.parametrize(
    ("mixer", "fields"),
    [
        pytest.param(
            *("delta_product", {"num_householder": 3, "tie_embeddings": True, "norm_eps": 1e-4}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("gated_delta_product", {"use_short_conv": False, "allow_neg_eigval": False}),
            marks=pytest.mark.slow,
        ),
        ("delta_net", {"qk_activation": "none", "expand_v": 2.0, "conv_size": 3}),
        ("gated_delta_net", {"num_v_heads": 4, "use_output_gate": False, "expand_v": 0.5}),
    ],
)
def test_ours_written_and_read_is_the_same_model(mixer, fields, tmp_path):
    model = tiny(mixer, **fields)
    fla.save(model, tmp_path)
    assert_same_model(model, fla.load(tmp_path, implementation="recurrent"))


def test_several_files_with_an_index(tmp_path):
    model = tiny("gated_delta_product")
    fla.save(model, tmp_path, most_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    assert all((tmp_path / name).stat().st_size < 6000 for name in files)
    assert index["metadata"]["total_size"] == 4 * sum(
        x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
    assert_same_model(model, fla.load(tmp_path, implementation="recurrent"))


@pytest.mark.usefixtures("all_devices")
def test_parameters_are_read_onto_a_mesh():
    mesh = make_mesh(DeviceConfig(mesh="data:1,fsdp:2,tensor:2"))
    spread = fla.load(FOLDERS / "b_ungated", mesh=mesh)
    kernel = spread.layers[0].attn.k_proj.kernel[...]
    assert kernel.sharding.spec == jax.P("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (24, 48)
    found = by_key(nnx.state(spread, nnx.Param))
    assert all(np.array_equal(found[key], x) for key, x in tensors("b_ungated").items())
    with pytest.raises(ConfigError, match=r"mesh has axes \('x',\)"):
        fla.load(FOLDERS / "b_ungated", mesh=jax.make_mesh((1,), ("x",)))


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path):
    model = tiny("gated_delta_product")
    fla.save(model, tmp_path / "tiny", facts={"Training": {"tokens": 1234567, "loss": None}})
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert card.startswith("# tiny\n\ngated_delta_product with 2 Householder factors per token")
    assert "| hidden_size | 8 |" in card
    assert "| tokens | 1,234,567 |" in card
    assert "loss" not in card
    ours, theirs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "AutoModelForCausalLM" in theirs
    assert "fla.load" in ours


REFUSED = {
    "another activation": ({"hidden_act": "powlu"}, "hidden_act='powlu'.*'swish'"),
    "a bias": ({"conv_bias": True}, "conv_bias=True"),
    "residual attention": ({"attnres_block_size": 1}, "attnres_block_size=1"),
    "a warp of the loss": ({"use_l2warp": True}, "use_l2warp=True"),
    "two gates": ({"use_gate": False}, "use_output_gate=True and use_gate=False"),
    "what nobody knows": ({"use_magic": 1}, "use_magic of config.json: no known option"),
    "another model": ({"model_type": "gla"}, "model_type='gla'.*gated_deltaproduct"),
    "a fork's spelling": ({"model_type": "gated_deltaproduct_decay"}, "model_type="),
    "a list of models": ({"model_type": []}, r"model_type=\[\] is not known; it may be"),
    "text for a number": ({"num_heads": "2"}, "num_heads='2' must be a whole number"),
    "a fraction of a head": ({"expand_v": 0.3}, "expand_v=0.3"),
    "no layer": ({"num_hidden_layers": 0}, "num_layers=0"),
}


@pytest.mark.parametrize(("changed", "says"), REFUSED.values(), ids=REFUSED)
def test_options_without_a_counterpart_are_refused_by_name(changed, says, tmp_path):
    folder = write(tmp_path, config("a_gated") | changed, {})
    with pytest.raises(ConfigError, match=says) as caught:
        fla.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mixer", "fields", "says"),
    [
        ("delta_product", {"beta_bias": 2.0}, "beta_bias=2.0"),
        ("delta_product", {"qk_activation": "none"}, "qk_activation='none'"),
        ("gated_delta_product", {"num_v_heads": 8}, "num_v_heads=8"),
        ("transformer", {}, "mixer='transformer'"),
        (
            *("delta_net", {"attention_every": 2, "num_layers": 2, "num_heads": 2}),
            "attention has 2 heads with keys of 32.*hidden_size / heads, as attention_heads",
        ),
    ],
)
def test_what_they_lack_is_not_written(mixer, fields, says, tmp_path):
    config = ModelConfig(mixer=mixer, vocab_size=11, **fields)
    model = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match=says):
        fla.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_blocks_of_another_kind_are_not_written(tmp_path):
    model = tiny("delta_net")
    model.layers[0].attn = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="a Linear in block 0, where its config says 'delta_net'"):
        fla.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_model_is_not_written_over(tmp_path):
    model = tiny("delta_net")
    fla.save(model, tmp_path)
    with pytest.raises(RunDirectoryError, match=r"holds README.md, config.json, model.safetensors"):
        fla.save(model, tmp_path)
    with pytest.raises(ConfigError, match="pad_token_id=11 must be from 0 to 10"):
        fla.save(model, tmp_path / "other", pad_token_id=11)
