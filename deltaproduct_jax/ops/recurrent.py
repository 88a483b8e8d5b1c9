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
from deltaproduct_jax.ops.layout import Tokens, pad
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype

# Tokens between two states that reverse mode keeps; those between are computed again. All states
# of a sequence would leave every cache, and a CPU takes most of its time to get memory for them.
BLOCK = 16


def recurrent(q, k, v, beta, g, initial_state, resets, *, scale, precision, blocks=True):
    """Scans over tokens; arguments as `delta_product` checked them, ``resets`` [B, T] bool or None.

    What is not finite counts as 0. Computes in float32 (float64 for float64 inputs) whatever the
    input dtype. Plain JAX: forward and reverse mode both work; reverse mode keeps the state before
    every block of `BLOCK` tokens, and computes the block's states and then each token again.
    Without ``blocks``, or where T is symbolic, it keeps several for every token; nothing is then
    copied into blocks, which saves a tenth of the time where nothing is differentiated.
    """
    T = q.shape[1]
    tokens = _widened(Tokens(q, k, v, beta, g, resets))
    body = functools.partial(_token, scale=scale, precision=precision)
    in_blocks = blocks and isinstance(T, int) and T >= 2 * BLOCK
    if in_blocks:
        tokens = _by_span(tokens, BLOCK)
        inner = functools.partial(jax.lax.scan, jax.checkpoint(body, prevent_cse=False))
        body = jax.checkpoint(lambda *operands: inner(*operands), prevent_cse=False)
    else:
        tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    final_state, o = jax.lax.scan(body, initial_state, tokens)
    o_TBHvV = o.reshape(-1, *o.shape[2:])[:T] if in_blocks else o
    return jnp.moveaxis(o_TBHvV, 0, 1).astype(v.dtype), final_state


def recurrent_in_spans(tokens: Tokens, initial_state, settings: Settings, *, keep_states: bool):
    """The same as `chunked` has it: arguments, results and the state before every span.

    For a gradient of many narrow states on a CPU, where the matrices of chunks are too small.
    """
    body = functools.partial(_token, scale=settings.scale, precision=_precision(settings))
    B, T, _, H, K = tokens.k.shape
    Hv, V = tokens.v.shape[-2:]

    def span(state, tokens):
        after, o = jax.lax.scan(body, state, tokens)
        return after, (o, state if keep_states else None)

    spans = _by_span(_widened(tokens), settings.cut.span)
    final_state, (o, states) = jax.lax.scan(span, initial_state, spans)
    o_BTHvV = jnp.moveaxis(o.reshape(-1, *o.shape[2:])[:T], 0, 1).astype(tokens.v.dtype)
    if keep_states:
        states = states.reshape(-1, B, H, Hv // H, K, V)
    return o_BTHvV, final_state, states


def recurrent_in_spans_backward(tokens: Tokens, states, do, dfinal_state, settings: Settings):
    """Cotangents as of `chunked_backward`; a span's states are computed again, its tokens' too."""
    body = functools.partial(_token, scale=settings.scale, precision=_precision(settings))
    body = jax.checkpoint(body, prevent_cse=False)
    T = tokens.q.shape[1]

    def span(dstate, item):
        state, tokens, do = item

        def run(state, differentiable):
            given = differentiable._replace(resets=tokens.resets)
            return jax.lax.scan(body, state, given)

        _, pullback = jax.vjp(run, state, tokens._replace(resets=None))
        return pullback((dstate, do))

    wide = _widened(tokens)
    spans = _by_span((wide, do.astype(wide.v.dtype)), settings.cut.span)
    states = states.reshape(-1, *dfinal_state.shape)
    dstate, dspans = jax.lax.scan(span, dfinal_state, (states, *spans), reverse=True)

    def as_in(dx, x):
        return jnp.moveaxis(dx.reshape(-1, *dx.shape[2:])[:T], 0, 1).astype(x.dtype)

    return jax.tree.map(as_in, dspans, tokens._replace(resets=None)), dstate


def _precision(settings: Settings) -> str:
    return settings.matmul.precision.name.lower()


def _widened(tokens: Tokens) -> Tokens:
    """In the dtype of the state: a CPU has no bfloat16, and would convert all for every token."""
    wide = tokens._replace(resets=None)
    wide = jax.tree.map(lambda x: x.astype(accumulator_dtype(x.dtype)), wide)
    return wide._replace(resets=tokens.resets)


def _by_span(tree, span: int):
    """Arrays [B, T, ...] as [spans, span, B, ...], with padding that changes no state."""

    def cut(x):
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(-1, span, *x.shape[1:])

    return jax.tree.map(cut, pad(tree, span))


def _token(state_BHvKV, token: Tokens, *, scale, precision):
    *arrays, reset = only_finite(token)  # here it is part of reading them, before a pass of its own
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
