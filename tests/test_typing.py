"""A user's script under mypy: what is right passes, and a misspelt name is an error with its line.

Only this package is read; JAX and Flax, which mypy takes a minute for, count as Any.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from deltaproduct_jax import GatedDeltaProduct
from deltaproduct_jax.layers.cell import DeltaProductOptions

ROOT = Path(__file__).parents[1]

SETTINGS = """
[mypy]
strict = true
ignore_missing_imports = true
[mypy-deltaproduct_jax.*]
follow_imports = silent
"""

SCRIPT = """
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import deltaproduct_jax
from deltaproduct_jax import (
    DeltaProductCell,
    DeltaProductState,
    GatedDeltaProduct,
    ModelConfig,
    SequenceModel,
    load_run,
)


def decode(layer: GatedDeltaProduct, x: jax.Array) -> DeltaProductState:
    y, state = layer(x)
    y, state = layer.step(state, y[:, -1])
    return state._replace(recurrent=2 * state.recurrent)


def cell() -> DeltaProductCell:
    return DeltaProductCell(16, num_heads=2, head_dim=8, beta_bias=None, rngs=nnx.Rngs(0))


def logits(run_directory: str | Path, tokens: jax.Array) -> jax.Array:
    model, config, step = load_run(run_directory, checkpoint="newest")
    print(deltaproduct_jax.__version__, config.train.learning_rate, step + 1)
    other = SequenceModel(ModelConfig(vocab_size=9, num_householder=3), rngs=nnx.Rngs(0))
    o, final_state = deltaproduct_jax.delta_product(*[jnp.ones((1, 2, 1, 4))] * 4, chunk_size=2)
    return model(tokens) + other(tokens)
"""

# What is misspelt, and what mypy says of it.
MISTAKES = {
    "DeltaProductCell(16, num_householders=3, rngs=nnx.Rngs(0))": '"num_householders"',
    "DeltaProductCell(16, num_householder='3', rngs=nnx.Rngs(0))": 'expected "int"',
    "GatedDeltaProduct(16, use_forget_gates=True, rngs=nnx.Rngs(0))": '"use_forget_gates"',
    "ModelConfig(hiden_size=8)": '"hiden_size"',
    "SequenceModel(ModelConfig())": '"rngs"',
    "cell().initialize_carry((2, 16)).recurent": '"recurent"',
    "GatedDeltaProduct(16, rngs=nnx.Rngs(0)).init_state(2).conv_q": '"conv_q"',
    "load_run(3)": '"load_run"',
    "load_run('runs/s3').modle": '"modle"',
    "load_run('runs/s3').config.train.learning_rates": '"learning_rates"',
    "deltaproduct_jax.delta_produkt": '"delta_produkt"',
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What mypy says of the script with the mistakes behind it, by line."""
    folder = tmp_path_factory.mktemp("typing")
    (folder / "settings.ini").write_text(SETTINGS)
    (folder / "script.py").write_text("\n".join([SCRIPT, *MISTAKES]) + "\n")
    options = ["--config-file=settings.ini", "--no-site-packages", "--cache-dir=cache"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--no-error-summary", "script.py"],
        cwd=folder, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = [line.split(":", 2) for line in done.stdout.splitlines() if ": error: " in line]
    assert all(name == "script.py" for name, _, _ in errors), done.stdout
    return {int(number): text for _, number, text in errors}


def test_a_right_script_has_no_errors(said):
    first_mistake = SCRIPT.count("\n") + 2
    assert {line: text for line, text in said.items() if line < first_mistake} == {}


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=list(MISTAKES))
def test_a_mistake_is_an_error_that_names_it(said, number):
    line = SCRIPT.count("\n") + 2 + number
    assert list(MISTAKES.values())[number] in said[line]


def test_the_cell_takes_what_the_layer_takes():
    keywords = get_type_hints(GatedDeltaProduct.__init__)
    assert ["self", *keywords] == list(inspect.signature(GatedDeltaProduct.__init__).parameters)
    del keywords["hidden_size"], keywords["rngs"]
    assert get_type_hints(DeltaProductOptions) == keywords
