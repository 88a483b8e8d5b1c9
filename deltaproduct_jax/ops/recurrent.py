"""The recurrence, token by token: the specification that every other implementation must match.

Shape suffixes: B batch, T tokens, R Householder factors per token, H key heads, Hv value heads
(a multiple of H), K key width, V value width. Source: DeltaProduct (Siems et al., 2025), section 3;
the gate multiplies the old state once per token, before the first factor.
"""

import functools

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.chunked import Settings
from deltaproduct_jax.ops.containment import only_finite
from deltaproduct_jax.ops.layout import Tokens, pad, put, take
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype
from deltaproduct_jax.ops.unavailable import if_cheap
from deltaproduct_jax.ops.varying import zeros_varying_as

# Tokens between two states that reverse mode keeps; those between are computed again. All states
# of a sequence would leave every cache, and a CPU takes most of its time to get memory for them.
BLOCK = 16


def recurrent(q, k, v, beta, g, initial_state, resets, *, scale, precision):
    """Scans over tokens; arguments as `delta_product` checked them, ``resets`` [B, T] bool or None.

    What is not finite counts as 0, if `mark_bad` has told of it. Computes in float32 (float64 for
    float64 inputs) whatever the input dtype. Plain JAX: forward and reverse mode both work; reverse
    mode keeps the state before every block of `BLOCK` tokens, and computes the block's states and
    then each token again. Where T is symbolic or short, it keeps several for every token.
    """
    T = q.shape[1]
    tokens = _finite_by_case(_widened(Tokens(q, k, v, beta, g, resets)))
    body = functools.partial(_token, scale=scale, precision=precision)
    in_blocks = isinstance(T, int) and T >= 2 * BLOCK
    if in_blocks:
        tokens = _by_block(tokens)
        inner = functools.partial(jax.lax.scan, jax.checkpoint(body, prevent_cse=False))
        body = jax.checkpoint(lambda *operands: inner(*operands), prevent_cse=False)
    else:
        tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    final_state, o = jax.lax.scan(body, initial_state, tokens)
    o_TBHvV = o.reshape(-1, *o.shape[2:])[:T] if in_blocks else o
    return jnp.moveaxis(o_TBHvV, 0, 1).astype(v.dtype), final_state


def recurrent_in_spans(tokens: Tokens, initial_state, settings: Settings, *, keep_states: bool):
    """The same as `chunked` has it: arguments, results and the state before every span.

    For narrow states on a CPU, where the matrices of chunks are too small. Tokens are read where
    they lie, and outputs written so: to put T in front, as a scan over arrays wants it, took a CPU
    a quarter of the time of heads of 16, most of it to get memory for the copies.
    """
    B, T, _, H, K = tokens.k.shape
    Hv, V = tokens.v.shape[-2:]
    wide, length = _widened(tokens), settings.cut.span
    if not keep_states:
        carry = (initial_state, zeros_varying_as((B, T, Hv, V), wide.v))
        over_all = functools.partial(_over_tokens, settings)
        # Two loops, of which one runs: this way nothing is copied where all is finite.
        careful = functools.partial(over_all, clean=only_finite)
        final_state, o = jax.lax.cond(_is_bad(wide), careful, over_all, carry, wide, 0)
        return o.astype(tokens.v.dtype), final_state, None
    padded = pad(wide, length)

    def span(carry, n):
        # A span by itself: the gradient of reading from it is of its size, not of the sequence's.
        part = _finite_by_case(jax.tree.map(lambda x: take(x, n, length), padded))
        return _over_tokens(settings, carry, part, n * length), carry[0]

    carry = (initial_state, zeros_varying_as((B, padded.v.shape[1], Hv, V), padded.v))
    (final_state, o), states = jax.lax.scan(span, carry, jnp.arange(padded.v.shape[1] // length))
    states = states.reshape(-1, B, H, Hv // H, K, V)
    return o[:, :T].astype(tokens.v.dtype), final_state, states


def recurrent_in_spans_backward(tokens: Tokens, states, do, dfinal_state, settings: Settings):
    """Cotangents as of `chunked_backward`; a span's states are computed again, its tokens' too."""
    T, length = tokens.q.shape[1], settings.cut.span
    padded = pad(_widened(tokens), length)
    padded_do = pad(do.astype(padded.v.dtype), length)
    run = functools.partial(_token, **_options(settings))

    def span(carry, item):
        n, state = item
        part, do = jax.tree.map(lambda x: take(x, n, length), (padded, padded_do))
        part = _finite_by_case(part)

        def again(state, t):
            return run(state, _read(part, t))[0], state

        def back(carry, item):
            dstate, gradients = carry
            t, state = item
            token = _read(part, t)

            def of_token(state, differentiable):
                return run(state, differentiable._replace(resets=token.resets))

            _, pullback = jax.vjp(of_token, state, token._replace(resets=None))
            dstate, dtoken = pullback((dstate, take(do, t, 1)[:, 0]))
            written = lambda whole, x: put(whole, x[:, None], n * length + t)
            return (dstate, jax.tree.map(written, gradients, dtoken)), None

        times = jnp.arange(length)
        _, before = jax.lax.scan(again, state, times)
        return jax.lax.scan(back, carry, (times, before), reverse=True)[0], None

    differentiable = padded._replace(resets=None)
    gradients = jax.tree.map(lambda x: zeros_varying_as(x.shape, x), differentiable)
    states = states.reshape(-1, *dfinal_state.shape)
    spans = (jnp.arange(len(states)), states)
    (dstate, gradients), _ = jax.lax.scan(span, (dfinal_state, gradients), spans, reverse=True)
    as_in = lambda dx, x: dx[:, :T].astype(x.dtype)
    return jax.tree.map(as_in, gradients, tokens._replace(resets=None)), dstate


def _over_tokens(settings: Settings, carry, tokens: Tokens, start, clean=lambda token: token):
    """The state and the outputs [B, T, Hv, V] after ``tokens``, of which the first is ``start``."""

    def body(carry, t):
        state, o_BTHvV = carry
        state, o_BHvV = _token(state, clean(_read(tokens, t)), **_options(settings))
        return (state, put(o_BTHvV, o_BHvV[:, None], start + t)), None

    return jax.lax.scan(body, carry, jnp.arange(tokens.q.shape[1]))[0]


def _options(settings: Settings) -> dict:
    return {"scale": settings.scale, "precision": settings.precision}


def _widened(tokens: Tokens) -> Tokens:
    """In the dtype of the state: a CPU has no bfloat16, and would convert all for every token."""
    wide = tokens._replace(resets=None)
    wide = jax.tree.map(lambda x: x.astype(accumulator_dtype(x.dtype)), wide)
    return wide._replace(resets=tokens.resets)


def _by_block(tokens: Tokens) -> Tokens:
    """Arrays [B, T, ...] as [blocks, BLOCK, B, ...], with padding that changes no state."""

    def cut(x):
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(-1, BLOCK, *x.shape[1:])

    return jax.tree.map(cut, pad(tokens, BLOCK))


def _read(tokens: Tokens, t) -> Tokens:
    return jax.tree.map(lambda x: take(x, t, 1)[:, 0], tokens)


def _is_bad(tokens: Tokens) -> jax.Array:
    """Whether `mark_bad` found anything that is not finite."""
    return if_cheap(jnp.any(jnp.isnan(tokens.beta)))


@jax.custom_jvp
def _finite_by_case(tokens: Tokens) -> Tokens:
    """To choose among all numbers of every token takes a CPU a quarter of its time."""
    return jax.lax.cond(_is_bad(tokens), only_finite, lambda tokens: tokens, tokens)


@_finite_by_case.defjvp
def _finite_by_case_jvp(primals, tangents):
    return _finite_by_case(*primals), tangents[0]


def _token(state_BHvKV, token: Tokens, *, scale, precision):
    *arrays, reset = token
    if reset is not None:
        state_BHvKV = jnp.where(reset[:, None, None, None], 0, state_BHvKV)
    o, state_BHvKV = recurrent_step(state_BHvKV, *arrays, scale=scale, precision=precision)
    return state_BHvKV, o


def recurrent_step(state, q, k, v, beta, g, *, scale, precision):
    """One token: state <- exp(g) state, then R rank-one corrections, then o = scale * state^T q."""
    matmul = Matmul.wide(q.dtype, precision)
    wide = accumulator_dtype(q.dtype)
    groups = v.shape[-2] // k.shape[-2]
    q_BHvK, k_BRHvK = (jnp.repeat(x.astype(wide), groups, axis=-2) for x in (q, k))
    v_BRHvV, beta_BRHv = v.astype(wide), beta.astype(wide)
    before = state
    if g is not None:
        decay_BHv = jnp.exp(g.astype(wide))
        state = _decayed(state, decay_BHv)
    for r in range(k.shape[1]):
        # Decayed or not, the state gives the same reading but for a factor: the old one is there
        # already, while the decayed one would be written and read once more.
        prediction_BHvV = matmul("bhk,bhkv->bhv", k_BRHvK[:, r], before if r == 0 else state)
        if r == 0 and g is not None:
            prediction_BHvV *= decay_BHv[..., None]
        write_BHvV = beta_BRHv[:, r, :, None] * (v_BRHvV[:, r] - prediction_BHvV)
        state += _outer(k_BRHvK[:, r], write_BHvV)
    o_BHvV = scale * matmul("bhk,bhkv->bhv", q_BHvK, state)
    return o_BHvV.astype(v.dtype), state


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _product(equation, x_axes, y_axes, x, y):
    """Products without a sum, ``equation`` as of `jnp.einsum`; its gradient is made of matmuls.

    JAX would sum over an axis of a broadcast product, and on a CPU such a sum takes many times as
    long as a matmul of the same terms. Forward it is the other way round.
    """
    return jnp.expand_dims(x, x_axes) * jnp.expand_dims(y, y_axes)


@_product.defjvp
def _product_jvp(equation, x_axes, y_axes, primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    product = functools.partial(jnp.einsum, equation, precision=jax.lax.Precision.HIGHEST)
    return _product(equation, x_axes, y_axes, x, y), product(dx, y) + product(x, dy)


# Of a state and its decays, and of keys and what they write.
_decayed = functools.partial(_product, "bhkv,bh->bhkv", (), (-1, -2))
_outer = functools.partial(_product, "bhk,bhv->bhkv", -1, -2)
