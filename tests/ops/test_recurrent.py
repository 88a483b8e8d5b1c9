"""What the recurrence keeps for its gradient, how it reads tokens, and that no result changes."""

import functools

import jax
import jax.numpy as jnp
from helpers import Case, cast, relative_error

from deltaproduct_jax.ops import recurrent as module
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.recurrent import BLOCK, recurrent, recurrent_in_spans
from deltaproduct_jax.ops.route import chunked_settings, sizes_of


def inputs(**sizes):
    arrays = cast(Case(T=2 * BLOCK + 5, B=2, gate="mild", **sizes).arrays(), "float32")
    tokens = tuple(jnp.asarray(arrays[name]) for name in ("q", "k", "v", "beta", "g"))
    resets = jnp.arange(tokens[0].shape[1])[None] % 11 == jnp.array([[3], [7]])
    return tokens, jnp.asarray(arrays["initial_state"]), resets


def test_the_recurrence_in_blocks_is_the_one_of_all_tokens(monkeypatch):
    """Blocks that T does not fill, with segments; reverse mode keeps less of them."""
    tokens, state, resets = inputs(K=4, V=3)

    def results():
        def run(tokens, state):
            return recurrent(*tokens, state, resets, scale=0.5, precision=None)

        outputs, pull = jax.vjp(run, tokens, state)
        kept = sum(x.size for x in jax.tree.leaves(pull) if x.ndim >= 4)
        return kept, (outputs, pull(jax.tree.map(jnp.sin, outputs)))

    kept_less, in_blocks = results()
    monkeypatch.setattr(module, "BLOCK", 2 * BLOCK)
    kept, of_all = results()
    assert kept_less < kept / 2
    for x, y in zip(jax.tree.leaves(in_blocks), jax.tree.leaves(of_all), strict=True):
        assert relative_error(x, y) < 1e-6


def test_tokens_read_where_they_lie_are_those_of_a_scan():
    """With a state for every span, and without and mapped; segments, heads in groups."""
    tokens, state, resets = inputs(K=4, V=3, H=1, G=2, R=2)
    want = jax.jit(functools.partial(recurrent, scale=0.5, precision=None))(*tokens, state, resets)
    tokens = Tokens(*tokens, resets)
    cut = {"scale": 0.5, "precision": None, "span": BLOCK, "chunk_size": BLOCK}
    settings = chunked_settings("cpu", jnp.dtype("float32"), sizes_of(tokens), **cut)

    def run(tokens, state, keep_states=False):
        return recurrent_in_spans(tokens, state, settings, keep_states=keep_states)

    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (tokens, state))
    mapped = jax.jit(jax.vmap(run)).lower(*twice)
    # A decision that is mapped would be a selection, and both loops would run.
    assert "stablehlo.case" in mapped.as_text()
    *in_spans, states = jax.jit(functools.partial(run, keep_states=True))(tokens, state)
    assert states.shape[0] == 3
    of_second = jax.tree.map(lambda x: x[1], mapped.compile()(*twice)[:2])
    for got in (in_spans, of_second):
        for x, y in zip(got, want, strict=True):
            assert relative_error(x, y) < 1e-6
