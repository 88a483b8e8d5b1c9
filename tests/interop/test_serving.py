"""Programs that JAX alone runs: in a process that cannot import this project, the same logits."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from interop.golden_models import drawn

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.interop import serving
from deltaproduct_jax.models import ModelConfig

PAGE = Path(serving.__file__).parent / "README.md"
LENGTHS = (9, 3, 6)
SIZES = {"vocab_size": 11, "hidden_size": 8, "num_heads": 2, "head_dim": 4, "num_layers": 2}

# The server of the page, then a few tokens more; what it finds is printed as JSON.
BEFORE = """
import sys
for name in ("deltaproduct_jax", "flax", "experiments"):
    sys.modules[name] = None  # importing it is an error
import numpy as np
folder, prompts, following = sys.argv[1], eval(sys.argv[2]), eval(sys.argv[3])
"""
AFTER = """
found = [logits]
for tokens in following:
    logits, state = step(parameters, state, np.asarray(tokens, np.int32))
    found.append(logits)
import json
print(json.dumps([np.asarray(x, np.float64).tolist() for x in found]))
"""


def server_of_the_page():
    (code,) = re.findall(r"```python\n(import json.*?)```", PAGE.read_text(), re.DOTALL)
    return code


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("mixer", ["gated_delta_product", "delta_net", "transformer"])
def test_a_process_without_this_project_computes_the_same(mixer, tmp_path):
    model = drawn(ModelConfig(mixer=mixer, **SIZES))
    serving.export(model, tmp_path / "served", piece=4)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 11, size=n).tolist() for n in LENGTHS]
    following = rng.integers(0, 11, size=(2, len(prompts))).tolist()
    code = BEFORE + server_of_the_page() + AFTER
    arguments = [code, str(tmp_path / "served"), repr(prompts), repr(following)]
    done = subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for row, prompt in enumerate(prompts):
        ids = prompt + [tokens[row] for tokens in following]
        logits = model(jnp.asarray([ids]))[0, len(prompt) - 1 :]
        theirs = [each[row] for each in found]
        assert relative_error(theirs, logits) < 1e-5


def test_what_cannot_be_written_is_one_line(tmp_path):
    model = drawn(ModelConfig(**SIZES))
    with pytest.raises(ConfigError, match="piece=0 is too small"):
        serving.export(model, tmp_path, piece=0)
    (tmp_path / "serving.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"holds serving.json; give another folder"):
        serving.export(model, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_what_was_stopped_leaves_nothing(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    model = drawn(ModelConfig(**SIZES))
    monkeypatch.setattr(serving, "write_tensors", stopped)
    with pytest.raises(KeyboardInterrupt):
        serving.export(model, tmp_path, piece=4)
    assert not list(tmp_path.iterdir())
