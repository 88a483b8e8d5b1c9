"""The gradient of an embedding: what the rule names is what a program for that platform holds."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from deltaproduct_jax.layers.embedding import Embed
from deltaproduct_jax.ops.blocks.lookup import FEW_ROWS, embedding_gradient


@pytest.mark.parametrize("rows", [11, FEW_ROWS, FEW_ROWS + 1])
def test_the_rule_is_what_is_lowered(rows):
    embed = Embed(rows, 8, rngs=nnx.Rngs(0))
    graph, params = nnx.split(embed)
    ids = jnp.zeros((2, 3), jnp.int32)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(ids))))
    traced = gradient.trace(params)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        held = ("stablehlo.scatter" in text, "stablehlo.dot_general" in text)
        found = {(True, False): "scatter", (False, True): "matmul"}[held]
        assert found == embedding_gradient(platform, rows), platform
