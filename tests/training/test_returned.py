"""What mixers and tasks of other people return, looked at before a program broadcasts it."""

import jax
import jax.numpy as jnp
import pytest
from example_plugins import EXAMPLES, flags_of, written
from flax import nnx

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import SequenceMixer
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.training.plugins import import_plugins
from experiments import train


@pytest.fixture
def files(tmp_path):
    with written(tmp_path) as files:
        yield files


# What a mixer of somebody else returns instead of outputs [B, T, D] and a state: a method of it,
# a piece of what the page shows, what stands there instead, and what is said of it.
RETURNED = [
    ("_mix", "jnp.swapaxes(means, 0, 1)), ", "means[-1:].swapaxes(0, 1)), ",
     r"shape of x, (2, 3, 4), got float32[2, 1, 4]"),
    ("_mix", "return self.out(jnp.swapaxes(means, 0, 1)), AverageState(mean)",
     "return self.out(jnp.swapaxes(means, 0, 1))", "a state, got float32[2, 3, 4]"),
    ("_mix", "1)), AverageState(mean)", "1)), mean",
     "must be a AverageState, as init_state makes it, got float32[2, 4]"),
    ("_mix", "1)), AverageState(mean)", "1)), AverageState(mean[:1])",
     "mean must be float32[2, 4], as init_state makes it for as many rows, got float32[1, 4]"),
    ("_token", "self.out(mean)[:, None], ", "self.out(mean), ",
     "shape of x, (2, 1, 4), got float32[2, 4]"),
    ("_token", "AverageState(mean)", "AverageState(mean.astype(jnp.bfloat16))",
     "mean must be float32[2, 4], as init_state makes it for as many rows, got bfloat16[2, 4]"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "piece", "instead", "said"), RETURNED)
def test_what_a_mixer_returns_is_looked_at(method, piece, instead, said, files, tmp_path):
    path, code = tmp_path / "average.py", EXAMPLES["average.py"]
    assert piece in code
    path.write_text(code.replace(piece, instead, 1))
    import_plugins([str(path)])
    layer, x = MIXERS["average"].layer(4, rngs=nnx.Rngs(0)), jnp.ones((2, 3, 4))
    call = layer if method == "_mix" else lambda x: layer.step(layer.init_state(2), x[:, 0])
    with pytest.raises(ConfigError, match=f"Average.{method}") as caught:
        jax.eval_shape(call, x)
    assert said in str(caught.value)


class Whole(SequenceMixer):
    """One that is no `RecurrentMixer` and returns what it is told."""

    def __init__(self, hidden_size: int, *, returned, rngs: nnx.Rngs):
        self.returned = nnx.data(returned)

    def init_state(self, batch_size):
        return ()

    def __call__(self, x, *, state=None, segment_ids=None, mask=None):
        return self.returned

    def step(self, state, x):
        return self.returned


@pytest.mark.parametrize("returned", [jnp.ones((2, 4)), (jnp.ones((1, 4)), ()), (jnp.ones(()), 3)])
def test_so_it_is_of_mixers_that_are_not_recurrent(returned):
    layer = Whole(4, returned=returned, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"^Whole\.__call__ must return"):
        layer(jnp.ones((2, 3, 4)))
    with pytest.raises(ConfigError, match=r"^Whole\.step must return"):
        layer.step((), jnp.ones((2, 4)))


# The same of a task: of what it draws, and of its scores.
DRAWN = [
    ("return Batch(inputs, targets, jnp.ones(inputs.shape, bool))", "return inputs, targets",
     "First.batch must return a Batch, got a tuple"),
    ("(batch_size, length)", "(1, length)", "inputs [B, T] with B=4, got shape (1, 4)"),
    ("Batch(inputs, ", "Batch(inputs[:, 0], ", "inputs [B, T] with B=4, got shape (4,)"),
    ("inputs[:, :1], inputs.shape", "inputs[:, :1], (batch_size, 1)",
     "targets of dtype int and the shape of inputs, (4, 4), got int32 of shape (4, 1)"),
    ("inputs, targets, jnp", "inputs, targets / 1, jnp", "got float32 of shape (4, 4)"),
    ("inputs.shape, bool", "inputs.shape", "mask of dtype bool and the shape of inputs, (4, 4), "
     "got float32"),
    ("jnp.ones(inputs.shape", "jnp.zeros(inputs.shape", "a mask that is true somewhere"),
    ("0, self.letters)", "5, 7)", "inputs from 0 to below vocab_size=4, got some from 5 to 6"),
    ("inputs, targets, jnp", "inputs, -1 - 0 * targets, jnp", "targets from 0 to below "
     "vocab_size=4, got some from -1 to -1"),
    ('"strict"', '"mine"', "First.score must return a dict of Score by name"),
    ('{"strict": score_positions(correct_BT, mask_BT)}', '{"strict": 0.5}', "'strict': 0.5"),
    ("(self.train_length, 2 * self.train_length)", "(8, 4)", "test_lengths=(8, 4) must ascend"),
    ("(self.train_length, 2 * self.train_length)", "()", "test_lengths=() must ascend"),
    ("2 * self.train_length", "1.5 * self.train_length", "test_lengths[1]=6.0 must be a whole"),
]  # fmt: skip


@pytest.mark.parametrize(("piece", "instead", "said"), DRAWN)
def test_what_a_task_draws_is_looked_at(piece, instead, said, files, tmp_path, capsys):
    path, code = tmp_path / "first.py", EXAMPLES["first.py"]
    assert piece in code
    path.write_text(code.replace(piece, instead))
    assert train.main(flags_of(tmp_path / "run", files, task="first", mixer="gla")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_mixer_of_another_dtype_leaves_the_models(files):
    """Its outputs, which are wider, are rounded to the model's dtype, as a scan of blocks needs."""
    import_plugins(files.split(","))
    sizes = {"vocab_size": 5, "hidden_size": 8, "intermediate_size": 8, "num_layers": 2}
    config = MIXERS["average"].config(**sizes, mixer="average", dtype="bfloat16", scan_layers=True)
    model = SequenceModel(config, rngs=nnx.Rngs(0))
    block, x = model.layers[0], jnp.ones((1, 3, 8), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # as its code counts on
        assert block.attn(x)[0].dtype == jnp.float32
        step = jax.eval_shape(block.step, block.attn.init_state(1), x[:, 0])
        found = jax.eval_shape(model, jnp.zeros((1, 3), int)), jax.eval_shape(block, x)[0], step[0]
    assert [y.dtype for y in found] == [jnp.bfloat16] * 3
