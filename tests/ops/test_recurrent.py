"""What the recurrence keeps for its gradient, and that this changes no result."""

import jax
import jax.numpy as jnp
from helpers import Case, cast, relative_error

from deltaproduct_jax.ops.recurrent import BLOCK, recurrent


def test_the_recurrence_in_blocks_is_the_one_of_all_tokens():
    """Blocks that T does not fill, with segments; reverse mode keeps less of them."""
    arrays = cast(Case(T=2 * BLOCK + 5, K=4, V=3, B=2, gate="mild").arrays(), "float32")
    tokens = tuple(jnp.asarray(arrays[name]) for name in ("q", "k", "v", "beta", "g"))
    resets = jnp.arange(tokens[0].shape[1])[None] % 11 == jnp.array([[3], [7]])

    def results(blocks):
        def run(tokens, state):
            options = {"scale": 0.5, "precision": None, "blocks": blocks}
            return recurrent(*tokens, state, resets, **options)

        outputs, pull = jax.vjp(run, tokens, arrays["initial_state"])
        kept = sum(x.size for x in jax.tree.leaves(pull) if x.ndim >= 4)
        return kept, (outputs, pull(jax.tree.map(jnp.sin, outputs)))

    (kept_less, in_blocks), (kept, of_all) = results(True), results(False)
    assert kept_less < kept / 2
    for x, y in zip(jax.tree.leaves(in_blocks), jax.tree.leaves(of_all), strict=True):
        assert relative_error(x, y) < 1e-6
