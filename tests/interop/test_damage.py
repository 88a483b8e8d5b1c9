"""Folders that are damaged, of another model, or point outside: one line, and nothing else."""

import contextlib
import json
import os
import re

import numpy as np
import pytest
from campaign.damage import cases
from hypothesis import given
from hypothesis import strategies as st
from interop.golden_models import FOLDERS, config, tensors, write

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.interop import fla
from deltaproduct_jax.interop.fla import loading

NAME = "b_ungated"
INDEX = "model.safetensors.index.json"


def refused(folder, says):
    with pytest.raises(RunDirectoryError, match=says) as caught:
        fla.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(tmp_path, **tensors_changed):
    return write(tmp_path / "m", config(NAME), dict(tensors(NAME)) | tensors_changed)


def test_all_that_does_not_fit_is_one_error(tmp_path):
    content = dict(tensors(NAME))
    for layer in (0, 1):
        del content[f"model.layers.{layer}.attn.o_proj.weight"]
    content["model.norm.weight"] = np.ones(7, np.float32)
    content["model.layers.1.attn.g_proj.weight"] = np.ones((32, 48), np.float32)
    content["model.layers.0.mlp_norm.weight"] = np.ones(48, np.int32)
    content["of\ntwo lines"] = np.ones(1, np.float32)
    text = refused(write(tmp_path, config(NAME), content), "has other tensors than its config.json")
    assert "missing: model.layers.{0,1}.attn.o_proj.weight;" in text
    assert "not of this model: model.layers.1.attn.g_proj.weight, of two lines;" in text
    assert "of another shape: model.norm.weight is [7], not [48];" in text
    assert text.endswith("of no dtype that is read: model.layers.0.mlp_norm.weight is I32")


def test_of_many_tensors_that_do_not_fit_some_are_named(tmp_path):
    extra = {f"tensor{letter}": np.ones(1, np.float32) for letter in "abcdefgh"}
    folder = changed(tmp_path, **extra)
    names = ", ".join(sorted(extra)[:5])
    assert refused(folder, "not of this model: ").endswith(f"not of this model: {names} and 3 more")


def test_embeddings_of_a_dtype_that_is_not_read(tmp_path):
    numbers = tensors(NAME)["model.embeddings.weight"].astype(np.int32)
    folder = changed(tmp_path, **{"model.embeddings.weight": numbers})
    refused(folder, "of no dtype that is read: model.embeddings.weight is I32")


def test_layers_that_are_not_there_are_not_waited_for(tmp_path):
    folder = write(tmp_path, config(NAME) | {"num_hidden_layers": 1000}, tensors(NAME))
    refused(folder, "has tensors of 2 layers; its config.json says num_hidden_layers=1000")
    folder = write(tmp_path / "more", config(NAME) | {"num_hidden_layers": 10**9}, tensors(NAME))
    with pytest.raises(ConfigError, match=r"config\.json: num_layers=1000000000 is too large"):
        fla.load(folder)


def test_the_fork_is_compared_as_well(tmp_path):
    content = dict(tensors(NAME))
    key = "model.layers.0.attn.k_proj.weight"
    for factor, piece in enumerate(np.split(content.pop(key), 3)):
        content[key.replace("k_proj", f"k_projs.{factor}")] = piece[:-1] if factor == 1 else piece
    text = refused(write(tmp_path, config(NAME), content), "other tensors")
    assert "model.layers.0.attn.k_projs.1.weight is [31, 48], not [32, 48]" in text
    assert "model.layers.1.attn.k_projs.{0,1,2}.weight" in text or "k_projs.2.weight" in text


@cases(40)
@given(st.sets(st.integers(0, 10**18 - 1), max_size=4), st.booleans())
def test_names_of_several_layers_are_one(layers, has_norm):
    keys = [f"model.layers.{layer}.attn.A_log" for layer in layers] + ["model.norm"] * has_norm
    found = loading.gathered(keys)
    listed = ",".join(map(str, sorted(layers)))
    name = f"model.layers.{{{listed}}}.attn" if len(layers) > 1 else f"model.layers.{listed}.attn"
    assert found == [f"{name}.A_log"] * bool(layers) + ["model.norm"] * has_norm


def test_a_layer_with_a_number_of_thousands_of_digits_is_none(tmp_path):
    name = f"model.layers.{'1' * 5000}.attn.A_log"
    refused(
        changed(tmp_path, **{name: np.ones(1, np.float32)}), "not of this model: model.layers.1"
    )


def test_a_tied_head_must_be_the_embedding(tmp_path):
    same = tensors(NAME)["model.embeddings.weight"]
    fla.load(changed(tmp_path / "same", **{"lm_head.weight": same}))
    refused(
        changed(tmp_path / "other", **{"lm_head.weight": same + 1}),
        "lm_head.weight differs from model.embeddings.weight, which it is tied to",
    )


def test_files_that_are_cut_or_no_such_file(tmp_path):
    whole = (FOLDERS / NAME / "model.safetensors").read_bytes()
    for number, data in enumerate(
        [b"", whole[:4], whole[:100], whole[:-1], whole + b"x", b"\xff" * 8 + whole[8:]]
    ):
        folder = write(tmp_path / str(number), config(NAME), {})
        (folder / "model.safetensors").write_bytes(data)
        refused(folder, "model.safetensors is damaged")


@pytest.mark.slow
def test_no_byte_of_a_header_ends_in_another_error(tmp_path):
    whole = (FOLDERS / NAME / "model.safetensors").read_bytes()
    folder = write(tmp_path, config(NAME), {})
    rng = np.random.default_rng(0)
    size = int.from_bytes(whole[:8], "little")
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(8 + size)] = rng.integers(256)
        (folder / "model.safetensors").write_bytes(data)
        with contextlib.suppress(RunDirectoryError, ConfigError):
            fla.load(folder)  # what is still whole is read


def test_config_json_is_checked(tmp_path):
    folder = write(tmp_path, config(NAME), tensors(NAME))
    refused(tmp_path / "nowhere", "is no folder")
    for data, says in ((b"{", "not valid JSON"), (b"[]", "must be an object"), (b"\xff", "JSON")):
        (folder / "config.json").write_bytes(data)
        refused(folder, says)
    (folder / "config.json").unlink()
    refused(folder, "config.json cannot be read")


def test_a_pickle_is_not_read(tmp_path):
    folder = write(tmp_path, config(NAME), {})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is a pickle, which is not read")


@pytest.mark.parametrize(
    "named", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "a\0b"]
)
def test_an_index_names_nothing_outside(named, tmp_path):
    folder = write(tmp_path / "m", config(NAME), tensors(NAME))
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors(NAME), named)}
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "it may be the name of one in this folder")


def test_links_lead_nowhere_else(tmp_path):
    folder = write(tmp_path / "m", config(NAME), tensors(NAME))
    inner = folder / "weights.safetensors"
    (folder / "model.safetensors").rename(inner)
    (folder / "model.safetensors").symlink_to(inner)
    fla.load(folder)
    inner.rename(tmp_path / "weights.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    refused(folder, "is a link that leads out of the folder")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")
    refused(folder, re.escape("model.safetensors"))
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "neither model.safetensors nor")


def test_an_index_says_where_everything_is(tmp_path):
    folder = write(tmp_path, config(NAME), tensors(NAME), file="one.safetensors")
    named = dict.fromkeys(tensors(NAME), "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": named}))
    fla.load(folder)
    missing = "model.norm.weight"
    other = {key: file for key, file in named.items() if key != missing} | {"x": "one.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": other}))
    refused(folder, f"does not say where these tensors are: {missing}, x")
    write(folder, config(NAME), {missing: tensors(NAME)[missing]}, file="two.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": named | {missing: "two.safetensors"}}))
    refused(folder, f"two.safetensors has {missing}, which one.safetensors has too")
    (folder / INDEX).write_text(json.dumps({"weight_map": named | {missing: "gone.safetensors"}}))
    refused(folder, "gone.safetensors cannot be read: No such file")
    (folder / INDEX).write_text(json.dumps({"weight_map": {missing: 3}}))
    refused(folder, "weight_map")
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}))
    refused(folder, "names no tensor")
