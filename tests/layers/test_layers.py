"""The layer against the reference implementation, its parallel form against its steps, padding."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import quick

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import DeltaProductCell, GatedDeltaProduct, SwiGLU
from deltaproduct_jax.layers.initializers import decay_step_init
from deltaproduct_jax.layers.mlp import swiglu_width
from deltaproduct_jax.layers.projection import over_tokens

# One layer of flash-linear-attention 0.6.0 with grouped value heads, computed in float64.
GOLDEN = Path(__file__).parents[1] / "data" / "layer_gva.npz"

VARIANTS = {
    "plain": {"use_forget_gate": False, "use_output_gate": False, "use_short_conv": False},
    "gated_conv": {},
    "grouped": {"num_v_heads": 4, "num_householder": 3, "expand_v": 1.5, "conv_size": 3},
    "recipe": {"use_short_conv": False, "qk_activation": "none", "beta_bias": 2.0},
}


def make_layer(variant: str, hidden_size: int = 12, **kwargs) -> GatedDeltaProduct:
    sizes = {"num_heads": 2, "head_dim": 6, "expand_v": 1.0}
    kwargs = sizes | VARIANTS[variant] | kwargs
    return GatedDeltaProduct(hidden_size, rngs=nnx.Rngs(0), **kwargs)


def inputs(B: int = 3, T: int = 11, D: int = 12, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, T, D), jnp.float32)


@nnx.jit
def run(layer: GatedDeltaProduct, x: jax.Array, **kwargs) -> tuple:
    return layer(x, **kwargs)


@nnx.jit
def step(layer: GatedDeltaProduct, state, x: jax.Array) -> tuple:
    return layer.step(state, x)


def by_steps(layer: GatedDeltaProduct, x: jax.Array, start, keep: np.ndarray, new: np.ndarray):
    """Outputs and state when the rows are read one token at a time.

    Tokens where ``keep [B, T]`` is False are left out; the state is dropped before a token where
    ``new [B, T]`` is True.
    """
    empty, state = layer.init_state(x.shape[0]), start
    choose = lambda use, a, b: jax.tree.map(
        lambda a, b: jnp.where(use.reshape(-1, *[1] * (a.ndim - 1)), a, b), a, b
    )
    outputs = []
    for t in range(x.shape[1]):
        state = choose(new[:, t], empty, state)
        y, after = step(layer, state, x[:, t])
        state = choose(keep[:, t], after, state)
        outputs.append(jnp.where(keep[:, t, None], y, 0))
    return jnp.stack(outputs, axis=1), state


def golden_leaf(layer: GatedDeltaProduct, name: str) -> tuple[nnx.Variable, object]:
    """The parameter of ``layer`` that the reference calls ``name``, and how its array turns."""
    module = name.split(".")[0]
    if name.endswith("conv1d.weight"):
        return getattr(layer, module).weight, lambda a: a[:, 0].T
    if name == "o_norm.weight":
        return layer.o_norm.scale, lambda a: a
    if name.endswith("proj.weight"):
        return getattr(layer, module).kernel, lambda a: a.T
    return getattr(layer, name), lambda a: a


def test_outputs_and_gradients_are_those_of_the_reference():
    with jax.enable_x64(True):
        data = np.load(GOLDEN)
        config = json.loads(str(data["config"]))
        kinds = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        layer = GatedDeltaProduct(config.pop("hidden_size"), **config, **kinds, rngs=nnx.Rngs(0))
        names = [key.removeprefix("param/") for key in data.files if key.startswith("param/")]
        assert len(names) == 13
        for name in names:
            leaf, turn = golden_leaf(layer, name)
            leaf.set_value(jnp.asarray(turn(data[f"param/{name}"]), jnp.float64))

        def loss(layer, x):
            y, _ = layer(x)
            return jnp.sum(y * jnp.asarray(data["dy"], y.dtype)), y

        x = jnp.asarray(data["x"], jnp.float64)
        gradients = nnx.grad(loss, argnums=(0, 1), has_aux=True)
        (d_layer, dx), y = nnx.jit(gradients)(layer, x)
        pairs = {"y": (y, data["y"]), "dx": (dx, data["dx"])}
        for name in names:
            gradient, turn = golden_leaf(d_layer, name)
            pairs[name] = (gradient[...], turn(data[f"grad/{name}"]))
        for name, (ours, theirs) in pairs.items():
            error = np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)
            assert error < 2e-7, f"{name}: {error}"  # the stored numbers are rounded to float32


@pytest.mark.parametrize("variant", quick(VARIANTS, ["gated_conv"]))
def test_steps_and_pieces_agree_with_the_whole(variant):
    layer, x = make_layer(variant), inputs()
    y, final = run(layer, x)
    always, never = np.ones((3, 11), bool), np.zeros((3, 11), bool)
    chex.assert_trees_all_close(
        by_steps(layer, x, layer.init_state(3), always, never), (y, final), atol=2e-6
    )
    first, state = run(layer, x[:, :4])
    second, state = run(layer, x[:, 4:], state=state)
    chex.assert_trees_all_close(jnp.concatenate([first, second], axis=1), y, atol=2e-6)
    chex.assert_trees_all_close(state, final, atol=2e-6)


# Row 0 holds pieces of 3, 1 and 7 tokens, and its first id returns; row 1 is one piece; row 2 is
# all short pieces, and the last one is shorter than a convolution.
SEGMENTS = np.array(
    [[5] * 3 + [2] + [5] * 7, [1] * 11, [0, 0, 1, 1, 0, 2, 3, 3, 3, 9, 9]], np.int32
)


@pytest.mark.parametrize("variant", quick(VARIANTS, ["gated_conv", "grouped"]))
def test_segments_share_nothing(variant):
    layer, x = make_layer(variant), inputs()
    start = run(layer, inputs(seed=1))[1]
    got = run(layer, x, state=start, segment_ids=jnp.asarray(SEGMENTS))
    new = np.diff(SEGMENTS, axis=1, prepend=SEGMENTS[:, :1]) != 0
    want = by_steps(layer, x, start, np.ones((3, 11), bool), new)
    chex.assert_trees_all_close(got, want, atol=2e-6)


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("variant", quick(["plain", "gated_conv", "grouped"], ["gated_conv"]))
def test_padding_anywhere_changes_nothing(variant, with_segments):
    layer, x = make_layer(variant), inputs(B=4)
    mask = np.ones((4, 11), bool)
    mask[0, :4] = mask[1, 8:] = mask[3] = False  # in front, behind, nothing else
    mask[2] = [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1]
    start = run(layer, inputs(B=4, seed=1))[1]
    x = jnp.where(mask[..., None], x, 1e3)  # what stands at padding must not matter
    segments, new = {}, np.zeros((4, 11), bool)
    if with_segments:
        segments = {"segment_ids": jnp.asarray(np.vstack([SEGMENTS, SEGMENTS[:1]]))}
        for row, kept in enumerate(mask):
            ids = np.asarray(segments["segment_ids"])[row, kept]
            new[row, kept] = np.diff(ids, prepend=ids[:1]) != 0
    got = run(layer, x, state=start, mask=jnp.asarray(mask), **segments)
    assert not np.any(got[0][~mask])
    chex.assert_trees_all_close(got, by_steps(layer, x, start, mask, new), atol=2e-6)


def test_beta_range_and_its_bias():
    x = inputs()
    for neg, bias in ((False, None), (True, None), (True, 30.0)):
        layer = make_layer("plain", allow_neg_eigval=neg, beta_bias=bias)
        beta = layer._inputs(x, layer.init_state(3), None, None)[3]
        top = 2.0 if neg else 1.0
        assert beta.min() > 0
        assert beta.max() <= top
        if bias is None:
            assert abs(float(beta.mean()) - top / 2) < 0.1
        else:
            assert np.all(beta == 2)


@pytest.mark.slow
def test_paper_initialisation_draws_each_factor_on_its_own():
    layer = make_layer("plain", hidden_size=96, head_dim=48, num_householder=4)
    bound = 2**-2.5 * (6 / (96 + 96)) ** 0.5
    kernel = np.asarray(layer.k_proj.kernel[...])
    assert kernel.shape == (96, 4 * 96)
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    fla = make_layer("gated_conv", hidden_size=96, initializer="fla", initializer_range=0.02)
    for leaf in (fla.q_proj.kernel, fla.o_proj.kernel, fla.k_conv1d.weight):
        assert abs(float(leaf[...].std()) / 0.02 - 1) < 0.2
    conv = np.asarray(make_layer("gated_conv", hidden_size=96).v_conv1d.weight[...])
    assert 0.4 < np.abs(conv).max() <= 0.5
    step = jax.nn.softplus(decay_step_init(jax.random.key(0), (4096,)))
    assert 1e-3 <= step.min() * 1.001
    assert step.max() <= 1.001e-1


def test_bfloat16_layer_keeps_a_float32_state():
    layer = make_layer("gated_conv", dtype=jnp.bfloat16)
    y, state = run(layer, inputs().astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert state.recurrent.dtype == jnp.float32
    reference, _ = run(make_layer("gated_conv"), inputs())
    error = np.linalg.norm(y.astype(np.float32) - reference) / np.linalg.norm(reference)
    assert error < 3e-2, error


@pytest.mark.slow
def test_cell_works_in_flax_rnn_and_under_extra_batch_axes():
    cell = DeltaProductCell(12, num_heads=2, head_dim=6, expand_v=1.0, rngs=nnx.Rngs(0))
    x = inputs()
    carry, y = nnx.RNN(cell, return_carry=True)(x)
    want, state = run(cell.mixer, x)
    chex.assert_trees_all_close(y, want, atol=2e-6)
    chex.assert_trees_all_close(carry, state, atol=2e-6)

    carry = cell.initialize_carry((2, 3, 12))
    carry, y = cell(carry, inputs(B=2, T=3))
    assert y.shape == (2, 3, 12)
    assert carry.recurrent.shape == (2, 3, 2, 6, 6)
    carry = cell.initialize_carry((4, 12), nnx.Rngs(carry=1), nnx.initializers.normal(1.0))
    assert carry.recurrent.std() > 0.5


def test_cell_is_a_plain_function_after_a_split():
    cell = DeltaProductCell(12, num_heads=2, head_dim=6, expand_v=1.0, rngs=nnx.Rngs(0))
    graph, params = nnx.split(cell)
    x = inputs()

    def loss(params):
        one = nnx.merge(graph, params)
        _, y = jax.lax.scan(one, cell.initialize_carry((3, 12)), x.swapaxes(0, 1))
        return jnp.sum(y**2)

    def parallel_loss(params):
        return jnp.sum(nnx.merge(graph, params).mixer(x)[0] ** 2)

    chex.assert_trees_all_close(
        jax.jit(jax.grad(loss))(params),
        jax.jit(jax.grad(parallel_loss))(params),
        rtol=1e-4,
        atol=1e-5,
    )


def test_linear_maps_take_tokens_as_rows_of_one_matrix():
    """On a CPU the gradient of a kernel otherwise writes its cotangent once more, transposed."""
    layer, x = SwiGLU(3, 5, rngs=nnx.Rngs(0)), jnp.arange(24.0).reshape(2, 4, 3)
    graph, params = nnx.split(layer)
    program = jax.make_jaxpr(lambda params, x: nnx.merge(graph, params)(x))(params, x)
    products = [e for e in program.eqns if e.primitive is jax.lax.dot_general_p]
    assert [e.invars[0].aval.ndim for e in products] == [2, 2, 2]
    kernel = jnp.arange(6.0).reshape(3, 2)
    for rows in (x, x[0], x[0, 0], x[:0]):
        dims = ((rows.ndim - 1,), (0,)), ((), ())
        np.testing.assert_array_equal(over_tokens(rows, kernel, dims), rows @ kernel)


def test_swiglu_width_is_the_references():
    assert [swiglu_width(d) for d in (128, 736, 768, 1024, 1468, 1536, 2048)] == [
        512, 2048, 2048, 2816, 4096, 4096, 5632
    ]  # fmt: skip
    mlp = SwiGLU(8, 16, rngs=nnx.Rngs(0))
    x = inputs(D=8)
    hidden = jax.nn.silu(x @ mlp.gate_proj.kernel[...]) * (x @ mlp.up_proj.kernel[...])
    chex.assert_trees_all_close(mlp(x), hidden @ mlp.down_proj.kernel[...], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_v_heads": 3}, "num_v_heads=3 must be a positive multiple of num_heads=2"),
        ({"expand_v": 0.7}, "expand_v=0.7 times head_dim=6"),
        ({"num_householder": 0}, "num_householder=0 is too small; it must be at least 1"),
        ({"num_heads": 0}, "num_heads=0 is too small"),
        ({"conv_size": 0}, "conv_size=0 is too small"),
        ({"qk_activation": "relu"}, "qk_activation='relu' is not known; it may be one of"),
        ({"initializer": "he"}, "initializer='he' is not known; it may be one of"),
    ],
)
def test_errors_name_the_argument(arguments, text):
    with pytest.raises(ConfigError, match=text.replace("(", r"\(")):
        make_layer("plain", **arguments)


def test_a_carry_of_ones_is_refused():
    with pytest.raises(ConfigError, match="carry_init"):
        DeltaProductCell(4, num_heads=1, head_dim=4, rngs=nnx.Rngs(0)).initialize_carry(
            (1, 4), carry_init=nnx.initializers.ones
        )
