"""The reference's models: folders as it writes them, what it computes with them, and ours."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from deltaproduct_jax.interop.fla.tensors import key_and_turn
from deltaproduct_jax.models import ModelConfig, SequenceModel

FOLDERS = Path(__file__).parents[1] / "data" / "fla"
NAMES = ("a_gated", "b_ungated")
TINY = {"vocab_size": 11, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "head_dim": 4}
TINY |= {"intermediate_size": 16, "implementation": "recurrent"}


@functools.cache
def golden(name):
    """Arrays of one model's golden.npz."""
    with np.load(FOLDERS / name / "golden.npz") as file:
        return {key: file[key] for key in file.files}


@functools.cache
def tensors(name):
    """The tensors of one model by the reference's keys."""
    return load_file(FOLDERS / name / "model.safetensors")


def config(name):
    """What its config.json says."""
    return json.loads((FOLDERS / name / "config.json").read_text())


def write(folder, saved, content, file="model.safetensors"):
    """A folder of the reference's, of a configuration and tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(saved))
    content = {key: np.ascontiguousarray(x) for key, x in content.items()}
    save_file(content, folder / file, metadata={"format": "pt"})
    return folder


def as_fork(name):
    """The same model as the paper's fork writes it: a module a factor, dead ones among them."""
    saved, content = config(name), dict(tensors(name))
    factors = saved["num_householder"]
    for key in list(content):
        for part in ("k_proj", "v_proj", "b_proj", "k_conv1d", "v_conv1d"):
            if f".{part}." in key:
                pieces = np.split(content.pop(key), factors)
                for factor, piece in enumerate(pieces):
                    content[key.replace(f".{part}.", f".{part}s.{factor}.")] = piece
        if ".q_conv1d." in key:
            used = content.pop(key)
            for factor in range(factors):  # only the first is read
                content[key.replace(".q_conv1d.", f".q_conv1ds.{factor}.")] = used + factor
    saved["use_gate"] = saved.pop("use_output_gate")
    saved |= {"expand_k": 1.0, "layer_type": "product", "norm_first": False, "clamp_min": None}
    return saved, content


def drawn(config: ModelConfig):
    """A model of ours with parameters of no particular kind, for which nothing is compiled."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return nnx.merge(graph, jax.tree.map(draw, nnx.to_pure_dict(shapes)))


def parameters(model):
    """Arrays of a model by their place."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def by_key(tree):
    """Arrays of parameters, or of their gradients, by the reference's keys and in its layout."""
    found = {}
    for path, leaf in nnx.to_flat_state(tree):
        key, turn = key_and_turn(path)
        found[key] = turn.there(np.asarray(leaf[...]))
    return found


def tiny(mixer, **fields):
    """A small model of ours, with all the parts that a mixer may have."""
    fields = {"use_output_gate": True, "use_short_conv": True} | fields
    return drawn(ModelConfig(mixer=mixer, **TINY, **fields))


def assert_same_model(one, other):
    """Parameters and fields are the same."""
    values = [parameters(one), parameters(other)]
    assert jax.tree.structure(values[0]) == jax.tree.structure(values[1])
    jax.tree.map(np.testing.assert_array_equal, *values)
    used = {"mixer", "norm_eps", "mlp_width", "tie_embeddings", *TINY}
    used |= set(one.config.registered.keywords) - {"initializer"}
    configs = (one.config, other.config)
    for name in used:
        first, second = (c.value_of(name) if hasattr(c, name) else None for c in configs)
        if name == "num_v_heads":
            first, second = (value or one.config.num_heads for value in (first, second))
        assert first == second, name
