"""SiLU, and lengths of q and k, as a part of the op: what they mean, whatever runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.ops import delta_product
from deltaproduct_jax.ops.convolution.raw import takes_raw

SHAPES = {"q": (2, 5, 2, 4), "k": (2, 5, 3, 2, 4), "v": (2, 5, 3, 2, 4), "beta": (2, 5, 3, 2)}
TOKENS = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(SHAPES.values())]


def unit(x):
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
@pytest.mark.parametrize("lengths", [True, False])
def test_silu_comes_first(implementation, lengths):
    def ours(q, k, v, b):
        how = {"use_silu": True, "use_qk_l2norm": lengths, "implementation": implementation}
        return delta_product(0.3 * q, 0.3 * k, v, jax.nn.sigmoid(b), **how)

    def apart(q, k, v, b):
        q, k, v = (jax.nn.silu(x) for x in (0.3 * q, 0.3 * k, v))
        q, k = (unit(x) for x in (q, k)) if lengths else (q, k)
        return delta_product(q, k, v, jax.nn.sigmoid(b), implementation="recurrent")

    outputs = [jax.vjp(f, *TOKENS) for f in (ours, apart)]
    cotangent = jax.tree.map(jnp.cos, outputs[1][0])
    found, wanted = ((o, pull(cotangent)) for o, pull in outputs)
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


def test_bfloat16_is_rounded_once():
    q, k, v, b = (x.astype(jnp.bfloat16) for x in TOKENS)
    how = {"implementation": "recurrent"}
    o, _ = delta_product(q, k, v, jax.nn.sigmoid(b), use_silu=True, use_qk_l2norm=True, **how)
    wide = [jax.nn.silu(x.astype(jnp.float32)) for x in (q, k, v)]
    q, k, v = (x.astype(jnp.bfloat16) for x in (unit(wide[0]), unit(wide[1]), wide[2]))
    np.testing.assert_array_equal(o, delta_product(q, k, v, jax.nn.sigmoid(b), **how)[0])


def test_without_kernels_nothing_takes_what_is_raw(monkeypatch):
    sizes = {"B": 128, "T": 8, "R": 2, "H": 8, "Hv": 8, "K": 32, "V": 32, "dtype": jnp.bfloat16}
    monkeypatch.setattr("deltaproduct_jax.ops.kernels.is_installed", lambda name: False)
    assert not takes_raw(**sizes)
    monkeypatch.setattr("deltaproduct_jax.ops.kernels.is_installed", lambda name: True)
    assert takes_raw(**sizes)
    assert not takes_raw(**sizes | {"K": 64})
    assert not takes_raw(**sizes | {"B": 16})
