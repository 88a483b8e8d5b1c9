"""The delta rule with a gate per channel, by the bars of every implementation, and what it equals.

Its own equation and its extremes are in test_baselines.py.
"""

import functools

import bars
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from deltaproduct_jax.ops import baselines, delta_product

B, H, K, V = 1, 2, 8, 6
FACTORS = {"e": "gamma", "k": "beta"}
DECAYS = {
    "mild": lambda rng, shape: -0.1 * rng.uniform(size=shape),
    "none": lambda rng, shape: np.zeros(shape),
    # Channels that forget everything beside others that keep it: no sum of these loses the rest.
    "strong": lambda rng, shape: rng.choice([0.0, -1e-3, -3.0, -1e4], size=shape),
}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(T, keys="unit", decay="mild", beta=None, signed=False, erases=True):
    rng = np.random.default_rng(0)
    normal = lambda *width: rng.normal(size=(B, T, H, *width))
    x = {"q": normal(K), "v": normal(V), "g": DECAYS[decay](rng, (B, T, H, K))}
    common = rng.normal(size=(B, 1, H, K))
    for key, size in FACTORS.items():
        spread = {"unit": 1.0, "near": 1e-3, "equal": 0.0}[keys]
        x[key] = unit(spread * normal(K) + (common if keys != "unit" else 0))
        x[size] = np.full((B, T, H), beta) if beta is not None else rng.uniform(0, 2, (B, T, H))
    if signed:
        x["negative"] = rng.uniform(size=(B, T, H, K)) < 0.4
    return x if erases else {name: a for name, a in x.items() if name not in ("e", "gamma")}


@functools.partial(jax.jit, static_argnames="implementation")
def outcome(x, state, negative, cotangents, implementation):
    """Outputs and the final state, and the gradients for their cotangents."""

    def forward(x, state):
        options = {"initial_state": state, "implementation": implementation}
        return baselines.channel_delta(**x, negative=negative, **options)

    results, pullback = jax.vjp(forward, x, state)
    return results, pullback(cotangents)


def errors(x, implementation):
    """Of outputs and of gradients in float32, against the recurrence in float64."""
    negative = x.pop("negative", None)
    rng = np.random.default_rng(1)
    state = rng.normal(size=(B, H, K, V))
    cotangents = rng.normal(size=x["v"].shape), rng.normal(size=state.shape)
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, outcome(x, state, negative, cotangents, "recurrent"))
    *single, do = jax.tree.map(lambda a: a.astype(np.float32), (x, state, cotangents))
    found = []
    for form in (implementation, "recurrent"):
        got = outcome(*single, negative, do, form)
        each = [
            [relative_error(a, b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True)]
            for pair in zip(got, want, strict=True)
        ]
        found.append([max(e) for e in each])
    return found


@pytest.mark.parametrize(
    "case",
    [
        {"T": 150},
        pytest.param({"T": 150, "decay": "strong"}, marks=pytest.mark.slow),
        pytest.param({"T": 150, "signed": True}, marks=pytest.mark.slow),
        pytest.param({"T": 150, "decay": "none", "beta": 2.0}, marks=pytest.mark.slow),
        {"T": 150, "decay": "none", "beta": 2.0, "keys": "equal"},
        {"T": 150, "decay": "none", "beta": 2.0, "keys": "near"},
        {"T": 150, "decay": "none", "beta": 2.0, "keys": "near", "erases": False},
        pytest.param({"T": 4096, "decay": "none", "beta": 2.0}, marks=pytest.mark.slow),
        pytest.param({"T": 1 << 16}, marks=pytest.mark.slow),
        pytest.param({"T": 1 << 16, "signed": True, "beta": 2.0}, marks=pytest.mark.slow),
    ],
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_float32_is_within_the_bars(case):
    (outputs, gradients), plain = errors(draw(**case), "chunked")
    plain = [float(error) for error in plain]
    allowed = [bars.OVER_PLAIN_RECURRENCE * error for error in plain]
    said = f"outputs {outputs:.1e}, gradients {gradients:.1e}; the plain recurrence {plain}"
    print(said)
    assert outputs <= max(bars.OUTPUTS["float32"], allowed[0]), said
    assert gradients <= max(bars.GRADIENTS["float32"], allowed[1]), said


@pytest.mark.slow
def test_equal_gates_make_a_delta_product_without_a_first_value():
    x = {n: a.astype(np.float32) for n, a in draw(40).items()}
    x["g"] = np.repeat(x["g"][..., :1], K, axis=-1)
    got = baselines.channel_delta(**jax.tree.map(jnp.asarray, x))
    two = lambda first, second: np.stack([x[first], x[second]], axis=2)
    v = np.stack([0 * x["v"], x["v"]], axis=2)
    want = delta_product(x["q"], two("e", "k"), v, two("gamma", "beta"), x["g"][..., 0])
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_a_signed_gate_and_a_reflection_turn_the_state():
    """diag(-1, 1) and the reflection along an angle are a rotation by twice that angle: order 5."""
    angle = np.pi / 5
    key = np.array([np.cos(angle), np.sin(angle)], np.float32)
    alike = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (1, 10, 1, *np.shape(x)))
    x = {"q": alike([1, 0]), "k": alike(key), "v": alike(np.zeros(2)), "g": alike(np.zeros(2))}
    o, state = baselines.channel_delta(
        **x,
        beta=alike(2.0),
        negative=alike([1, 0]) > 0,
        scale=1.0,
        initial_state=jnp.eye(2)[None, None],
    )
    turned = o[0, :, 0, 0]  # the cosine of where the first axis has come to
    np.testing.assert_allclose(turned, np.cos(2 * angle * np.arange(1, 11)), atol=1e-5)
    np.testing.assert_allclose(state[0, 0], np.eye(2), atol=1e-5)
