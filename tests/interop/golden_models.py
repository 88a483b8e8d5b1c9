"""The reference's models: folders as it writes them, what it computes with them, and ours."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from deltaproduct_jax.models import ModelConfig, SequenceModel

FOLDERS = Path(__file__).parents[1] / "data" / "fla"
NAMES = ("a_gated", "b_ungated")


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
