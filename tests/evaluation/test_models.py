"""A model and its tokenizer from a directory: the tokenizer's own place, ends, dtype."""

import json

import pytest
from interop.golden_models import drawn

from deltaproduct_jax.data.tokenizer import train_bpe
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.evaluation.models import checkpoint_of, open_model
from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import ModelConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    fla.save(drawn(ModelConfig(vocab_size=260, hidden_size=8, num_heads=2, head_dim=4)), path)
    return path


@pytest.mark.parametrize(("text", "checkpoint"), [
    ("best", "best"), ("0", 0), ("120", 120), ("-1", "-1"), ("²", "²"), ("1" * 5000, "1" * 5000),
])  # fmt: skip
def test_a_step_is_a_number_and_all_else_a_name(text, checkpoint):
    assert checkpoint_of(text) == checkpoint


def test_a_folder_has_its_tokenizer_and_its_ends(folder):
    with pytest.raises(
        ConfigError, match=r"is missing, and .* names none that is here; it may be b"
    ):
        open_model(str(folder))
    (folder / "tokenizer.json").write_bytes(train_bpe(["to be or not to be"] * 4, 258).data)
    model, tokenizer, ends = open_model(str(folder), dtype="bfloat16")
    assert tokenizer.decode(tokenizer.encode("to be")) == "to be"
    assert ends == (tokenizer.bos_id, 2)
    assert model.config.dtype == "bfloat16"
    assert model.embeddings.embedding[...].dtype == "float32"
    (folder / "tokenizer.json").write_bytes(train_bpe(["to be or not to be"] * 4, 264).data)
    with pytest.raises(ConfigError, match=r"tokenizer has 26[1-9] ids; the model has 260"):
        open_model(str(folder))
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"eos_token_id": [3, 4]}))
    assert open_model(str(folder), tokenizer="bytes").ends == (256, 3, 4)
    (folder / "config.json").write_text(json.dumps(saved | {"eos_token_id": [256, 258, 5]}))
    assert open_model(str(folder), tokenizer="bytes").ends == (256, 5)  # of 257 ids
    for end, says in ((1 << 40, "be from 0 to below"), (-3, "be from 0"), (True, "be a whole num")):
        (folder / "config.json").write_text(json.dumps(saved | {"eos_token_id": [2, end]}))
        with pytest.raises(RunDirectoryError, match=rf"config\.json: eos_token_id.* must {says}"):
            open_model(str(folder), tokenizer="bytes")
    for checkpoint in ("newest", "3", "9" * 5000):
        with pytest.raises(ConfigError, match=f"^checkpoint={checkpoint} is for runs; .* folder"):
            open_model(str(folder), tokenizer="bytes", checkpoint=checkpoint)
    with pytest.raises(RunDirectoryError, match=r"has no config\.json; it may be a run"):
        open_model(str(folder / "nowhere"))
