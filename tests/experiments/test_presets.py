"""Presets mean what they meant in version 0.1, or when they came, with every mixer of then."""

import dataclasses
import importlib
import json

import pytest
from sweeps.helpers import ROOT

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.extending import with_defaults
from experiments.lib import flags
from experiments.lib.task_experiment import NOT_FLAGS

# config.json as version 0.1 wrote it by default, and what it had otherwise with another mixer.
SAVED = json.loads((ROOT / "tests" / "data" / "presets.json").read_text())
SCRIPTS = ("state_tracking", "formal_languages", "recall")


def resolved(script: str, preset: str, *argv: str) -> dict:
    return config_of(script, preset, *argv).to_dict()


def config_of(script: str, preset: str, *argv: str) -> RunConfig:
    module = importlib.import_module(f"experiments.{script}")
    argv = ["--workdir=w", f"--preset={preset}", *argv]
    parsed = flags.parse(argv, module.SECTIONS, module.PRESETS, exclude=NOT_FLAGS)
    return module.configure(parsed.sections)


@pytest.mark.parametrize("name", SAVED)
def test_presets_are_what_they_were(name):
    script, preset = name.split("/")
    want = SAVED[name]["config"]
    config = config_of(script, preset)
    assert config.to_dict() == with_defaults(want, config)
    for mixer, change in SAVED[name]["mixers"].items():
        with_mixer = want | {"model": want["model"] | change}
        config = config_of(script, preset, f"--mixer={mixer}")
        assert config.to_dict() == with_defaults(with_mixer, config)


def test_every_preset_is_held():
    found = {
        f"{s}/{p}" for s in SCRIPTS for p in importlib.import_module(f"experiments.{s}").PRESETS
    }
    assert found == SAVED.keys()


def test_a_constant_learning_rate_has_no_end_of_a_presets():
    assert resolved("state_tracking", "default")["train"]["end_learning_rate"] > 0
    constant = resolved("state_tracking", "default", "--schedule=constant")
    assert constant["train"]["end_learning_rate"] == 0
    with pytest.raises(ConfigError, match=r"end_learning_rate=0\.1 needs schedule=cosine"):
        resolved("state_tracking", "default", "--schedule=constant", "--end_learning_rate=.1")


def test_what_presets_leave_to_the_mixer_is_what_it_was():
    delta = {
        "num_v_heads": None, "expand_v": 1.0, "num_householder": 2, "allow_neg_eigval": True,
        "qk_activation": "silu", "beta_bias": None, "use_output_gate": False,
        "use_short_conv": False, "conv_size": 4, "conv_implementation": None,
        "implementation": None, "chunk_size": None,
    }  # fmt: skip
    op = {"implementation": None, "chunk_size": None}
    gated = {"initial_gate": None}
    linear = {"expand_v": 1.0, "allow_neg_eigval": True} | op | gated
    channel = gated | {
        name: value
        for name, value in delta.items()
        if name not in ("num_householder", "conv_implementation")
    }
    want = {
        "delta_net": delta | {"num_householder": 1},
        "gated_delta_net": delta | gated | {"num_householder": 1},
        "delta_product": delta,
        "gated_delta_product": delta | gated,
        "transformer": {
            "expand_v": 1.0,
            "max_length": 2048,
            "num_kv_heads": None,
            "qkv_bias": False,
            "window_size": None,
            "rope_theta": 10000.0,
        },
        "mamba2": linear | {"num_v_heads": None, "conv_size": 4},
        "gla": linear,
        "mlstm": {"conv_size": 4} | op | gated,
        "slstm": gated,
        "rwkv7": linear,
        "kimi_delta_attention": channel,
        "complex_kimi_delta_attention": channel,
        "erase_then_delta": channel,
    }
    none = [f.name for f in dataclasses.fields(ModelConfig) if f.default in (None, "auto")]
    for mixer, values in want.items():
        config = ModelConfig(mixer=mixer)
        assert {n: config.value_of(n) for n in none if MIXERS[mixer].takes(n)} == values
