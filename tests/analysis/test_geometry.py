"""Geometry of Householder factors: weights set by hand give the group they were made for."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import flags_for, snapshot

from deltaproduct_jax.analysis import householder_geometry as geometry
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import GatedDeltaProduct
from deltaproduct_jax.models import ModelConfig, SequenceModel
from experiments import state_tracking
from experiments.analysis import householder_geometry as script
from experiments.lib import flags

# The dihedral group of the triangle: three rotations as two reflections each, and three reflections
# as one, by the angle of their keys in the first two dimensions; None: a factor with beta = 0.
TRIANGLE = [(0, 0), (0, 60), (0, 120), (0, None), (60, None), (120, None)]
D, K, BOS = 6, 4, 6


def model_of_the_triangle() -> SequenceModel:
    """A model whose head 0 acts as TRIANGLE says; head 1 has betas of 1 and one key for all."""
    config = ModelConfig(
        vocab_size=7, hidden_size=D, num_heads=2, head_dim=K, num_householder=2,
        intermediate_size=8, qk_activation="none",
    )  # fmt: skip
    model = SequenceModel(config, rngs=nnx.Rngs(0))
    embeddings = np.zeros((7, D))
    embeddings[:6] = np.eye(6)
    model.embeddings.embedding.set_value(jnp.asarray(embeddings, jnp.float32))
    k_DRHK, b_DRH = np.zeros((D, 2, 2, K)), np.zeros((D, 2, 2))
    k_DRHK[:, :, 1, 2] = 3.0
    for token, angles in enumerate(TRIANGLE):
        for r, degrees in enumerate(angles):
            angle = np.deg2rad(degrees or 0)
            k_DRHK[token, r, 0, :2] = 5 * np.cos(angle), 5 * np.sin(angle)
            b_DRH[token, r, 0] = -30 if degrees is None else 30
    mixer = model.layers[0].attn
    mixer.k_proj.kernel.set_value(jnp.asarray(k_DRHK.reshape(D, -1), jnp.float32))
    mixer.b_proj.kernel.set_value(jnp.asarray(b_DRH.reshape(D, -1), jnp.float32))
    return model


@pytest.fixture(scope="module")
def triangle():
    return geometry.factors_of_tokens(model_of_the_triangle(), range(6), before=BOS)


def test_known_betas_and_keys(triangle):
    assert triangle.k.shape == (6, 2, 2, K)
    want = [[2, 2]] * 3 + [[2, 0]] * 3
    np.testing.assert_allclose(triangle.beta[:, :, 0], want, atol=1e-6)
    np.testing.assert_allclose(triangle.beta[:, :, 1], 1, atol=1e-6)
    np.testing.assert_array_equal(triangle.decay, np.ones((6, 2)))
    np.testing.assert_allclose(triangle.k[1, 1, 0], [0.5, 0.75**0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(triangle.k, axis=-1), 1, rtol=1e-6)


def test_the_transitions_are_the_group(triangle):
    found = geometry.transitions(triangle)[:, 0]
    rotations = [np.eye(K) for _ in range(3)]
    for power, matrix in enumerate(rotations):
        turn = np.deg2rad(120 * power)
        matrix[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    np.testing.assert_allclose(found[:3], rotations, atol=1e-5)
    mirrors = [np.diag([-1.0, 1, 1, 1]), found[4], found[5]]
    np.testing.assert_allclose(found[3], mirrors[0], atol=1e-5)
    for left in found:  # closed under products
        for right in found:
            assert min(np.abs(left @ right - each).max() for each in found) < 1e-5


def test_eigenvalues_dimensions_and_heads_that_reflect(triangle):
    found = geometry.geometry(triangle)
    assert found["reflecting_heads"] == []  # the mirrors have a factor with beta = 0
    rotating = geometry.Factors(triangle.k[:3], triangle.beta[:3].copy(), triangle.decay[:3])
    assert geometry.geometry(rotating)["reflecting_heads"] == [0]
    assert geometry.reflecting_heads(rotating, tolerance=1.0) == [0, 1]
    rotating.beta[1, 1, 0] = 1.85  # one factor of one token is enough
    assert geometry.reflecting_heads(rotating) == []
    assert geometry.reflecting_heads(rotating, tolerance=0.16) == [0]
    first, second = found["heads"]
    values = np.array(first["eigenvalues"]) @ [1, 1j]
    np.testing.assert_allclose(values[0], 1, atol=1e-5)
    for token in (1, 2):
        cube_roots = np.sort_complex(values[token, :2])
        np.testing.assert_allclose(cube_roots, np.exp([-2j * np.pi / 3, 2j * np.pi / 3]), atol=1e-5)
    np.testing.assert_allclose(values[3:, 0], -1, atol=1e-5)
    np.testing.assert_allclose(values[3:, 1:], 1, atol=1e-5)
    about_zero = first["explained_about_zero"]
    assert about_zero[0] < 0.99
    np.testing.assert_allclose(about_zero[1:], 1, atol=1e-9)
    # One key for all tokens does not vary, and has one dimension.
    assert second["explained_variance"] == [1.0] * K
    np.testing.assert_allclose(second["explained_about_zero"], 1, atol=1e-9)
    # (1 - beta) twice, since beta = 1 projects.
    np.testing.assert_allclose(np.array(second["eigenvalues"])[:, 0], 0, atol=1e-5)
    json.dumps(found, allow_nan=False)


def test_variance_and_sums_about_zero():
    vectors = np.array([[1.0, 0], [-1, 0], [0, 0.5], [0, 0.5]])
    np.testing.assert_allclose(geometry.explained(vectors, centred=False), [0.8, 1])
    np.testing.assert_allclose(geometry.explained(vectors, centred=True), [2 / 2.25, 1])


@pytest.mark.slow
def test_transitions_are_what_the_layer_does_to_its_state():
    layer = GatedDeltaProduct(
        D, num_heads=2, num_v_heads=4, head_dim=K, num_householder=3, expand_v=1.0,
        use_short_conv=True, use_output_gate=False, implementation="recurrent", rngs=nnx.Rngs(1),
    )  # fmt: skip
    layer.v_proj.kernel.set_value(jnp.zeros_like(layer.v_proj.kernel.get_value()))
    keys = jax.random.split(jax.random.key(0))
    x_BTD = jax.random.normal(keys[0], (1, 5, D))
    state = layer.init_state(1)
    state = state._replace(recurrent=jax.random.normal(keys[1], state.recurrent.shape))
    after = layer(x_BTD, state=state)[1].recurrent[0]
    found = layer.token_factors(x_BTD)
    k, _, beta, g = (np.asarray(a[0], np.float64) for a in found)
    k = geometry.normalised(np.repeat(k, 2, axis=-2))
    want = np.asarray(state.recurrent[0], np.float64)
    for matrix in geometry.transitions(geometry.Factors(k, beta, np.exp(g))):
        want = matrix @ want
    assert np.linalg.norm(after - want) <= 1e-5 * np.linalg.norm(want)


def test_a_key_head_serves_its_group_of_value_heads():
    config = ModelConfig(
        vocab_size=7, hidden_size=8, num_heads=2, num_v_heads=4, head_dim=4,
        mixer="gated_delta_net", num_householder=1,
    )  # fmt: skip
    model = SequenceModel(config, rngs=nnx.Rngs(0))
    found = geometry.factors_of_tokens(model, [1, 2, 3])
    assert found.k.shape == (3, 1, 4, 4)
    assert found.decay.shape == (3, 4)
    assert ((found.decay > 0) & (found.decay < 1)).all()
    np.testing.assert_array_equal(found.k[:, :, 0], found.k[:, :, 1])
    np.testing.assert_array_equal(found.k[:, :, 2], found.k[:, :, 3])
    assert np.abs(found.k[:, :, 1] - found.k[:, :, 2]).max() > 0.1


@pytest.mark.slow
def test_a_later_layer_sees_what_stands_before():
    config = ModelConfig(
        vocab_size=7, hidden_size=8, num_heads=1, head_dim=4, num_layers=2,
        implementation="recurrent",
    )  # fmt: skip
    model = SequenceModel(config, rngs=nnx.Rngs(0))
    for layer, differs in ((0, False), (1, True)):
        with_bos = geometry.factors_of_tokens(model, [1, 2], before=BOS, layer=layer)
        alone = geometry.factors_of_tokens(model, [1, 2], layer=layer)
        assert (np.abs(with_bos.beta - alone.beta).max() > 1e-6) == differs
    with pytest.raises(ConfigError, match=r"layer=2 is not there; it may be 0 to 1"):
        geometry.factors_of_tokens(model, [1], layer=2)
    model.layers[0].attn = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="has no Householder factors; it may be a delta_net"):
        geometry.factors_of_tokens(model, [1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    sizes = {"num_heads": 2, "head_dim": 4, "intermediate_size": 8, "implementation": "recurrent"}
    fields = {"steps": 2, "eval_lengths": (4,), "group": "S3", "max_displaced": 2}
    assert state_tracking.main(flags_for(workdir, **sizes, **fields)) == 0
    return workdir


@pytest.mark.slow
def test_the_script_draws_a_trained_run_and_leaves_it_alone(trained, tmp_path, capsys):
    under_way = trained / "checkpoints" / "99.orbax-checkpoint-tmp" / "file"
    under_way.parent.mkdir()
    under_way.write_text("a save of the run, which goes on")
    before = snapshot(trained)
    command = [f"--run={trained}", f"--workdir={tmp_path}", "--tolerance=1.5"]
    assert flags.run(script.command, command) == 0
    assert snapshot(trained) == before
    assert (tmp_path / "geometry.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "geometry.json").read_text())
    assert found["reflecting_heads"] == [0, 1]
    assert np.shape(found["heads"][0]["beta"]) == (4, 2)  # the identity and three swaps
    assert np.shape(found["heads"][1]["eigenvalues"]) == (4, 4, 2)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("head  reflecting")
    assert [line.split()[:2] for line in lines] == [["0", "yes"], ["1", "yes"]]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--run=absent", r"run=absent is no run directory: it has no config\.json"),
        ("--run=", "--run is missing"),
        ("--layer=3", "layer=3 is not there; it may be 0 to 0"),
        ("--tolerance=3", r"tolerance=3\.0 must be in \[0, 2\]"),
    ],
)
def test_errors_of_the_script_are_one_line(argument, says, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert flags.run(script.command, [f"--run={trained}", "--workdir=out", argument]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_without_checkpoints_is_one_line(trained, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((trained / "config.json").read_bytes())
    assert flags.run(script.command, [f"--run={tmp_path / 'run'}", f"--workdir={tmp_path}"]) == 2
    assert "run has no checkpoints" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json"}
