"""Mapped gradients of grouped value heads do not end the process.

On a CPU, XLA of jaxlib 0.10.2 fuses a sum with the product that is summed. At rank 7, over an axis
in front of the last ones, what it makes of them writes beside its buffers, and the process ends
then or in a later compilation. The smallest program found::

    x = jnp.ones((8, 2, 1, 2, 2, 16, 8))
    jax.jit(lambda x: jnp.sum(x * x, axis=4))(x)  # a few more compilations, and it ends

Rank 6, a sum over the last axis, a sum without a product and a product of matrices are all right;
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= turns such fusions off.
"""

import os
import subprocess
import sys

import pytest

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
# What was corrupted shows at the latest here.
AFTER = """
for n in range(20, 24):
    jax.jit(lambda a: a * n + jnp.sin(a) @ a.T)(jnp.ones((n, n))).block_until_ready()
print("alive")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(OP.replace("NAME", "'chunked'"), id="chunked"),
        pytest.param(OP.replace("NAME", "'associative'"), id="associative"),
        pytest.param(LAYER, id="layer"),
        pytest.param(WHOLE, id="whole"),
        pytest.param(SECOND, id="second derivative"),
        pytest.param(TWICE.replace("NAME", "'chunked'"), id="mapped twice"),
    ],
)
def test_a_mapped_gradient_leaves_the_process_alive(program):
    environment = {n: x for n, x in os.environ.items() if n != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", program + AFTER],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr[-500:]
