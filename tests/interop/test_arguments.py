"""Arguments that make no sense to what reads and writes checkpoints: one line, nothing written."""

import re

import numpy as np
import pytest
from interop.golden_models import FOLDERS, drawn

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.interop import fla, serving
from deltaproduct_jax.models import ModelConfig

PLATFORMS = "must be a list of 'cpu', 'cuda', 'rocm', 'tpu', or None for this machine's"
REFUSED = {
    "model=None must be a SequenceModel": (fla.save, {"model": None}),
    "bos_token_id='1' must be a whole number or none": (fla.save, {"bos_token_id": "1"}),
    "eos_token_id=1.5 must be a whole number": (fla.save, {"eos_token_id": 1.5}),
    "pad_token_id=True must be a whole number": (fla.save, {"pad_token_id": True}),
    "most_bytes='5GB' must be a whole number": (fla.save, {"most_bytes": "5GB"}),
    "most_bytes=0 is too small; it must be at least 1": (fla.save, {"most_bytes": 0}),
    "facts=3 must be a Mapping or none": (fla.save, {"facts": 3}),
    "facts['Training']=3 must be a Mapping": (fla.save, {"facts": {"Training": 3}}),
    "directory=None must be a path": (fla.save, {"directory": None}),
    "directory=b'models' must be a path": (serving.export, {"directory": b"models"}),
    "model='served' must be a SequenceModel": (serving.export, {"model": "served"}),
    "piece='8' must be a whole number": (serving.export, {"piece": "8"}),
    f"platforms='cuda' {PLATFORMS}": (serving.export, {"platforms": "cuda"}),
    f"platforms=('gpu',) {PLATFORMS}": (serving.export, {"platforms": ("gpu",)}),
    f"platforms=() {PLATFORMS}": (serving.export, {"platforms": ()}),
    "directory=3 must be a path": (fla.load, {"directory": 3}),
    "mesh='data:2' must be a Mesh or none": (fla.load, {"mesh": "data:2"}),
    "param_dtype=dtype('float32') must be a text": (fla.load, {"param_dtype": np.dtype("float32")}),
}


@pytest.fixture(scope="module")
def model():
    return drawn(ModelConfig(vocab_size=5, hidden_size=8, num_heads=2, head_dim=4, num_layers=1))


@pytest.mark.parametrize("text", REFUSED)
def test_an_argument_is_named(text, model, tmp_path):
    function, change = REFUSED[text]
    written = function is not fla.load
    right = {"model": model, "directory": tmp_path / "new"} if written else {}
    given = {"directory": FOLDERS / "a_gated", **right, **change}
    with pytest.raises(ConfigError, match=re.escape(text)):
        function(**given)
    assert not any(tmp_path.iterdir())


def test_programs_are_not_written_over_a_checkpoint(model, tmp_path):
    """Both have parameters in a file of one name."""
    fla.save(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(RunDirectoryError, match=r"holds model\.safetensors; give another folder"):
        serving.export(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
