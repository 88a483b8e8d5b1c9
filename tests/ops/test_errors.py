"""What a caller reads when an argument is wrong: its name, what it got, what it may be."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.ops import (
    carry_state,
    cu_seqlens_from_segment_ids,
    delta_product,
    delta_product_step,
    segment_ids_from_cu_seqlens,
    select_implementation,
)

B, T, R, H, Hv, K, V = 2, 5, 3, 2, 4, 8, 6


def inputs(**changes):
    arrays = {
        "q": jnp.zeros((B, T, H, K)),
        "k": jnp.zeros((B, T, R, H, K)),
        "v": jnp.zeros((B, T, R, Hv, V)),
        "beta": jnp.zeros((B, T, R, Hv)),
        "g": jnp.zeros((B, T, Hv)),
    }
    return {**arrays, **changes}


CASES = {
    "q is a list": (
        inputs(q=[1.0]),
        "q must be a JAX or NumPy array, got list",
    ),
    "q of another machine": (
        inputs(q=np.zeros((B, T, H, K), ">f4")),
        "q must have this machine's order of bytes, got >f4; x.astype(x.dtype.newbyteorder('='))",
    ),
    "k is missing its factors": (
        inputs(k=jnp.zeros((B, T * R, H, K))),
        "k must have 5 dimensions [B, T, R, H, K] with B=2, T=5, H=2, K=8, got 4: shape "
        "(2, 15, 2, 8); an array [B, T*R, ...] becomes [B, T, R, H, K] by a reshape",
    ),
    "beta is missing its heads": (
        inputs(beta=jnp.zeros((B, T, R))),
        "beta must have 4 dimensions [B, T, R, Hv]",
    ),
    "q of another rank": (
        inputs(q=jnp.zeros((T, K))),
        "q must have 4 dimensions [B, T, H, K], got 2",
    ),
    "k of another width": (
        inputs(k=jnp.zeros((B, T, R, H, 9))),
        "k must have shape [B, T, R, H, K] with B=2, T=5, H=2, K=8, got (2, 5, 3, 2, 9): "
        "K is 9 instead of 8",
    ),
    "v of another length": (inputs(v=jnp.zeros((B, 4, R, Hv, V))), "T is 4 instead of 5"),
    "v of other factors": (inputs(v=jnp.zeros((B, T, 2, Hv, V))), "R is 2 instead of 3"),
    "g per factor": (inputs(g=jnp.zeros((B, T, R, Hv))), "g must have 3 dimensions [B, T, Hv]"),
    "beta per key head": (inputs(beta=jnp.zeros((B, T, R, H))), "Hv is 2 instead of 4"),
    "no factor": (
        inputs(k=jnp.zeros((B, T, 0, H, K)), v=jnp.zeros((B, T, 0, Hv, V))),
        "k must have R of at least 1, got shape (2, 5, 0, 2, 8)",
    ),
    "no key width": (inputs(q=jnp.zeros((B, T, H, 0))), "q must have K of at least 1"),
    "heads that do not divide": (
        inputs(v=jnp.zeros((B, T, R, 3, V)), beta=jnp.zeros((B, T, R, 3)), g=jnp.zeros((B, T, 3))),
        "v has Hv=3 value heads and k has H=2 key heads; Hv must be a multiple of H",
    ),
    "integer q": (
        inputs(q=jnp.zeros((B, T, H, K), int)),
        "q must have a dtype among bfloat16, float16, float32, float64, got int32",
    ),
    "mixed dtypes": (
        inputs(k=jnp.zeros((B, T, R, H, K), jnp.bfloat16)),
        "k must be float32 when q is float32, got bfloat16; cast it with k.astype(...)",
    ),
    "g in another dtype": (
        inputs(g=jnp.zeros((B, T, Hv), jnp.bfloat16)),
        "g must be float32 when q is float32, got bfloat16",
    ),
    "state shape": (
        inputs(initial_state=jnp.zeros((B, Hv, V, K))),
        "initial_state must have shape [B, Hv, K, V] with B=2, Hv=4, K=8, V=6, got (2, 4, 6, 8)",
    ),
    "state dtype": (
        inputs(initial_state=jnp.zeros((B, Hv, K, V), jnp.bfloat16)),
        "initial_state must be float32 when q is float32, got bfloat16",
    ),
    "segment_ids dtype": (
        inputs(segment_ids=jnp.zeros((B, T))),
        "segment_ids must have an integer dtype, got float32",
    ),
    "segment_ids that JAX would cut off": (
        inputs(segment_ids=np.arange(B * T).reshape(B, T) << 32),
        "segment_ids must hold integers from -2147483648 to 2147483647, which int32 can, got some "
        f"from 0 to {(B * T - 1) << 32}; jax.config.update('jax_enable_x64', True) keeps int64",
    ),
    "segment_ids shape": (
        inputs(segment_ids=jnp.zeros((T,), int)),
        "segment_ids must have 2 dimensions [B, T] with B=2, T=5, got 1: shape (5,)",
    ),
    "chunk_size of nought": (inputs(chunk_size=0), "chunk_size must be at least 1, got 0"),
    "negative chunk_size": (inputs(chunk_size=-16), "chunk_size must be at least 1, got -16"),
    "chunk_size of a float": (inputs(chunk_size=16.0), "chunk_size must be an int"),
    "chunk_size where there are no chunks": (
        inputs(chunk_size=16, implementation="recurrent"),
        "chunk_size=16 has no meaning for implementation='recurrent'; leave it None",
    ),
    "unknown implementation": (
        inputs(implementation="cuda"),
        "implementation='cuda' is not available; it may be one of 'chunked', 'recurrent', "
        "'associative'",
    ),
    "unknown precision": (
        inputs(precision="tf32"),
        "precision='tf32' is not known; it may be 'default', 'high', 'highest', None",
    ),
    "scale as an array": (
        inputs(scale=jnp.ones(())),
        "scale must be a Python number or None (K**-0.5)",
    ),
    "scale that is no number": (inputs(scale=float("nan")), "scale=nan must be a finite number"),
    "endless scale": (inputs(scale=np.float32("-inf")), "scale=np.float32(-inf) must be a finite"),
    "scale beyond every float": (inputs(scale=10**400), "must be a finite number; None is K**-0.5"),
    "scale beyond float32": (inputs(scale=1e39), "scale=1e+39 cannot be held in float32"),
    "scale that float32 holds as 0": (inputs(scale=1e-60), "scale=1e-60 cannot be held in float32"),
    "complex scale": (inputs(scale=np.complex64(1)), "scale=np.complex64(1+0j) must be a finite"),
    "precisions in a list": (inputs(precision=["highest"]), "precision=['highest'] is not known"),
    "q with a mask of NumPy's": (
        inputs(q=np.ma.ones((B, T, H, K), np.float32)),
        "q must be an array without a mask of NumPy's",
    ),
    "scale of truth": (inputs(scale=True), "scale must be a Python number or None"),
    "a text for a truth": (
        inputs(use_qk_l2norm="false"),
        "use_qk_l2norm must be True or False, got 'false'",
    ),
    "a number for a truth": (inputs(use_silu=1), "use_silu must be True or False, got 1"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CASES)
def test_text(name):
    arguments, text = CASES[name]
    with pytest.raises(ValueError, match=re.escape(text)):
        delta_product(**arguments)


@pytest.mark.usefixtures("unchecked")
def test_errors_come_while_tracing_too():
    with pytest.raises(ValueError, match="K is 9 instead of 8"):
        jax.jit(delta_product)(**inputs(k=jnp.zeros((B, T, R, H, 9))))


@pytest.mark.usefixtures("unchecked")
def test_step():
    one = {name: x[:, 0] for name, x in inputs().items()}
    state = jnp.zeros((B, Hv, K, V))
    with pytest.raises(ValueError, match=re.escape("q must have 3 dimensions [B, H, K], got 4")):
        delta_product_step(state, **{**one, "q": inputs()["q"]})
    with pytest.raises(ValueError, match="state must be float32 when q is float32, got bfloat16"):
        delta_product_step(state.astype(jnp.bfloat16), **one)
    with pytest.raises(ValueError, match=re.escape("state must have shape [B, Hv, K, V]")):
        delta_product_step(state[:, :1], **one)


@pytest.mark.parametrize("implementation", ["chunked", None])
@pytest.mark.parametrize(
    "where",
    ["called plainly", "in jit", "around jit", "in a scan", "jacfwd", "twice", "reverse over it"],
)
def test_forward_mode_names_the_remedy(implementation, where):
    arrays = tuple(inputs().values())

    def op(*arrays):
        return delta_product(*arrays, implementation=implementation)[0]

    def in_a_scan(*arrays):
        return jax.lax.scan(lambda c, _: (c + jnp.sum(op(*arrays)), None), 0.0, length=2)[0]

    def pushed(*arrays):
        return jax.jvp(op, arrays, arrays)[1]

    calls = {
        "called plainly": lambda: jax.jvp(op, arrays, arrays),
        "in jit": lambda: jax.jit(lambda *x: jax.jvp(op, x, x))(*arrays),
        "around jit": lambda: jax.jvp(jax.jit(op), arrays, arrays),
        "in a scan": lambda: jax.jvp(in_a_scan, arrays, arrays),
        "jacfwd": lambda: jax.jacfwd(op)(*arrays),
        "twice": lambda: jax.jvp(pushed, arrays, arrays),
        "reverse over it": lambda: jax.grad(lambda *x: jnp.sum(pushed(*x)))(*arrays),
    }
    with pytest.raises(TypeError, match='implementation="recurrent" or "associative"'):
        calls[where]()


SIZES = {"B": 1, "T": 8, "R": 2, "Hv": 4, "K": 16, "V": 16, "differentiated": False}
SELECTIONS = {
    "platform='zz' is not known": {"platform": "zz", "B": -1},
    "B must be a whole number of at least 0, got -1": {"B": -1},
    "T must be a whole number of at least 0, got 8.0": {"T": 8.0},
    "K must be a whole number of at least 1, got True": {"K": True},
    "H must be a whole number of at least 1, got 0": {"H": 0},
    "Hv must be a whole number of at least 1, got 0": {"Hv": 0, "H": None},
    "Hv=4 must be a multiple of H=3": {"H": 3},
    "differentiated must be True or False, got 'no'": {"differentiated": "no"},
    "dtype='int8' must be a dtype among bfloat16": {"dtype": "int8"},
    "dtype=None must be a dtype among": {"dtype": None},
    "chunk_size must be at least 1, got -1": {"chunk_size": -1},
    "precision='exact' is not known": {"precision": "exact"},
}


@pytest.mark.usefixtures("unchecked")
def test_questions_about_implementations():
    for text, change in SELECTIONS.items():
        with pytest.raises(ValueError, match=re.escape(text)):
            select_implementation(**{"platform": "cpu"} | SIZES | change)


@pytest.mark.usefixtures("unchecked")
def test_packing():
    state, ids = jnp.zeros((B, Hv, K, V)), jnp.zeros((B,), int)
    with pytest.raises(ValueError, match=re.escape("next_ids must have shape [B] with B=2, got")):
        carry_state(state, ids, ids[:1])
    with pytest.raises(ValueError, match="state must have 4 dimensions"):
        carry_state(state[0], ids, ids)
    with pytest.raises(ValueError, match="cu_seqlens must be integers in one dimension"):
        segment_ids_from_cu_seqlens(jnp.array([0.0, 3.0]), 3)
    with pytest.raises(ValueError, match="num_tokens must be a whole number of at least 0, got -3"):
        segment_ids_from_cu_seqlens(jnp.array([0, 3]), -3)
    # Values that are known: such bounds would give other segments, without a word.
    for bounds in ([0, 3, 2], [1, 3], [0, 5], []):
        text = f"and end at num_tokens=4 at most, got {bounds}"
        with pytest.raises(ValueError, match=re.escape(text)):
            segment_ids_from_cu_seqlens(np.array(bounds, np.int32), 4)
    with pytest.raises(ValueError, match="cu_seqlens must hold integers from -2147483648"):
        segment_ids_from_cu_seqlens(np.array([0, 1 << 32]), 4)
    with pytest.raises(ValueError, match="last_ids must have an integer dtype, got float32"):
        carry_state(state, ids.astype(jnp.float32), ids)
    with pytest.raises(ValueError, match="next_ids must be a JAX or NumPy array, got list"):
        carry_state(state, ids, [0] * B)
    with pytest.raises(ValueError, match="segment_ids must have an integer dtype, got float32"):
        cu_seqlens_from_segment_ids(np.zeros((1, 4), np.float32))


def test_segment_ids_of_unknown_values():
    with pytest.raises(ValueError, match="call it outside jit"):
        jax.jit(cu_seqlens_from_segment_ids)(jnp.zeros((1, 4), int))


def test_the_checker_is_on_elsewhere():
    """The other tests run with annotations enforced; without that this call has our own error."""
    with pytest.raises(Exception, match="Type-check error"):
        delta_product(**inputs(q=np.zeros((B, T, H, K + 1), np.float32)))
