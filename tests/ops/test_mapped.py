"""Mapped gradients do not end the process, and are those of a loop.

On a CPU, XLA of jaxlib 0.10.2 fuses a sum with the product that is summed. At rank 7, over an axis
in front of the last ones, what it makes of them writes beside its buffers, and the process ends
then or in a later compilation. The smallest program found::

    x = jnp.ones((8, 2, 1, 2, 2, 16, 8))
    jax.jit(lambda x: jnp.sum(x * x, axis=4))(x)  # a few more compilations, and it ends

Rank 6, a sum over the last axis, a sum without a product and a product of matrices are all right;
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= turns such fusions off.

At any rank it adds up other numbers, without a word, where one factor lacks the first axes of the
other, the sum goes into another product, and there are some thousands of sums. So it did in every
norm whose cotangents alone are mapped. The smallest program found::

    x, y = jax.random.normal(jax.random.key(0), (2, 8, 1536, 4))
    jax.jit(lambda x, y: x * jnp.sum(x * y, axis=-1, keepdims=True))(x[0], y)

Equal first axes, a sum that goes nowhere else and a product of matrices are all right.
"""

import os
import subprocess
import sys

import pytest

from deltaproduct_jax.layers import registry

OP = """
import jax, jax.numpy as jnp
from deltaproduct_jax import delta_product
a = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(
    [(1, 8, 2, 4), (1, 8, 2, 2, 4), (1, 8, 2, 4, 8), (1, 8, 2, 4)])]
run = lambda *a: delta_product(*a, use_qk_l2norm=True, implementation=NAME)[0]
out, pull = jax.vjp(run, *a)
mapped = jax.jit(jax.vmap(pull))(jnp.stack([out, 2 * out]))
for x, y in zip(mapped, pull(out)):
    assert jnp.allclose(x[0], y, atol=1e-4), abs(x[0] - y).max()
"""
SECOND = """
import jax, jax.numpy as jnp
from deltaproduct_jax import delta_product
a = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(
    [(1, 8, 2, 4), (1, 8, 2, 2, 4), (1, 8, 2, 4, 8), (1, 8, 2, 4), (1, 8, 4)])]
a[4] = -abs(a[4])
def pulled(*a):
    run = lambda *a: delta_product(*a, use_qk_l2norm=True, implementation="chunked")[0]
    return jax.vjp(run, *a)[1](jnp.ones((1, 8, 4, 8)))
second = jax.jit(lambda c: jax.vjp(pulled, *a)[1](c))
c = tuple(a)
mapped = jax.jit(jax.vmap(second))(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), c))
for x, y in zip(mapped, second(c)):
    assert jnp.allclose(x[0], y, atol=1e-3 * abs(y).max()), abs(x[0] - y).max()
"""
TWICE = (
    OP.replace("jax.vmap(pull)", "jax.vmap(jax.vmap(pull))")
    .replace("(jnp.stack([out, 2 * out]))", "(jnp.stack([jnp.stack([out, 2 * out])] * 3))")
    .replace("x[0], y", "x[1, 0], y")
    .replace("abs(x[0]", "abs(x[1, 0]")
)
LAYER = """
import jax, jax.numpy as jnp
from flax import nnx
from deltaproduct_jax import GatedDeltaProduct
m = GatedDeltaProduct(8, num_heads=2, num_v_heads=6, head_dim=4, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(1), (1, 16, 8))
rows = jax.jacrev(lambda x: m(x)[0][0, -1])(x)
assert jnp.allclose(rows[3], jax.grad(lambda x: m(x)[0][0, -1, 3])(x), atol=1e-4)
"""
# As where runs train together: whatever the gradient reads is mapped.
WHOLE = """
import jax, jax.numpy as jnp
from deltaproduct_jax import delta_product
shapes = [(2, 4, 17, 2, 8), (2, 4, 17, 2, 2, 8), (2, 4, 17, 2, 2, 8), (2, 4, 17, 2, 2)]
a = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes)]
run = lambda *a: delta_product(*a, use_qk_l2norm=True, implementation="chunked")[0]
loss = jax.grad(lambda *a: jnp.sum(run(*a) * jnp.arange(8)), argnums=(0, 1, 2, 3))
mapped = jax.jit(jax.vmap(loss))(*a)
for x, y in zip(mapped, loss(*(x[1] for x in a))):
    assert jnp.allclose(x[1], y, rtol=1e-3, atol=1e-3), abs(x[1] - y).max()
"""
# A gradient of one map for many cotangents, as `jax.jacrev` asks for it, against each alone.
PULLED = """
import jax, jax.numpy as jnp
def close(run, *arguments):
    y, pull = jax.vjp(run, *arguments)
    c = jax.random.normal(jax.random.key(7), (9, *y.shape), y.dtype)
    mapped = jax.jit(lambda c: jax.vmap(pull)(c))(c)
    of_one = jax.jit(pull)(c[5])
    for x, y in zip(jax.tree.leaves(mapped), jax.tree.leaves(of_one)):
        error, size = jnp.linalg.norm(x[5] - y), jnp.linalg.norm(y)
        assert error <= 1e-4 * size, (error, size)
"""
NORMS = (
    PULLED
    + """
from deltaproduct_jax.layers import RMSNorm
from deltaproduct_jax.layers.norm import HeadNorm
from deltaproduct_jax.ops.convolution.raw import l2_normalise
x = jax.random.normal(jax.random.key(1), (3, 170, 4, 12))
for run in l2_normalise, RMSNorm(12), HeadNorm(4, 12):
    close(run, x)
"""
)
MIXERS = (
    PULLED
    + """
from flax import nnx
from deltaproduct_jax import ModelConfig
from deltaproduct_jax.models.mixers import make_mixer
config = ModelConfig(mixer=NAME, hidden_size=24, num_heads=4, head_dim=12, num_layers=2)
graph, params = nnx.split(make_mixer(config, 0, nnx.Rngs(0)))
x = jax.random.normal(jax.random.key(1), (3, 170, 24))
close(lambda params, x: nnx.merge(graph, params)(x)[0], params, x)
"""
)
# What was corrupted shows at the latest here.
AFTER = """
for n in range(20, 24):
    jax.jit(lambda a: a * n + jnp.sin(a) @ a.T)(jnp.ones((n, n))).block_until_ready()
print("alive")
"""


def slow(program, name):
    return pytest.param(program, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(NORMS, id="norms"),
        *(slow(MIXERS.replace("NAME", repr(name)), name) for name in registry.MIXERS),
        slow(OP.replace("NAME", "'chunked'"), "chunked"),
        slow(OP.replace("NAME", "'associative'"), "associative"),
        slow(LAYER, "layer"),
        slow(WHOLE, "whole"),
        slow(SECOND, "second derivative"),
        slow(TWICE.replace("NAME", "'chunked'"), "mapped twice"),
    ],
)
def test_a_mapped_gradient_is_right_and_leaves_the_process_alive(program):
    environment = {n: x for n, x in os.environ.items() if n != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", program + AFTER],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr[-500:]
