"""Programs that do not fit into memory are refused before they run, in one line."""

import jax
import jax.numpy as jnp
import pytest
import tiny_run

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.training.measuring import memory
from experiments import state_tracking
from experiments.lib import flags

SHORT = "RESOURCE_EXHAUSTED: Out of memory allocating 152473833968 bytes."


def quadratic(x):
    """Needs the square of a vector of random numbers, which no fusion can leave out."""
    square = jnp.outer(x, x)
    return square @ (square @ x)


def test_what_the_compiler_sets_aside_is_held_against_what_there_is(monkeypatch):
    lowered = jax.jit(quadratic).lower(jax.ShapeDtypeStruct((1024,), jnp.float32))
    assert memory.within_memory(lowered, "a square")(jnp.ones(1024)).shape == (1024,)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"a square, needs at least .* GiB of memory; there are"):
        memory.within_memory(lowered, "a square")


def test_a_compiler_that_runs_out_of_memory_is_one_line(monkeypatch):
    class Lowered:
        def __init__(self, says):
            self.says = says

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.says)

    with pytest.raises(ConfigError, match=r"^a step, does not fit into memory: Out of memory"):
        memory.within_memory(Lowered(f"{SHORT}\nAllocations:\n1. ..."), "a step")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        memory.within_memory(Lowered("INTERNAL: a fault"), "a step")


def test_a_run_that_does_not_fit_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    argv = tiny_run.flags_for(tmp_path / "run", batch_size=512)
    assert state_tracking.main(argv) == flags.USAGE_ERROR
    error = capsys.readouterr().err.splitlines()[-1]
    sizes = "train_length=4, batch_size=512, accumulation_steps=1"
    assert f"the training step, sequences of 4 tokens, {sizes}, needs at least" in error
    assert not (tmp_path / "run").exists()


def test_lengths_are_named_by_the_settings_that_they_come_from():
    config = tiny_run.run_config(eval_lengths=(4, 7), curriculum=(2, 3), select_length=5)
    assert memory.training_sizes(config).startswith("train_length=4, curriculum=(2, 3), batch")
    assert memory.evaluation_sizes(config).startswith("eval_lengths=(4, 7), select_length=5, eval")


def test_memory_that_runs_out_anywhere_is_one_line(capsys):
    def command(argv):
        raise jax.errors.JaxRuntimeError(SHORT)

    assert flags.run(command, []) == flags.USAGE_ERROR
    said = "error: memory is short: Out of memory allocating 152473833968 bytes.\n"
    assert capsys.readouterr().err == said
