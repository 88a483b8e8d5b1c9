"""Which implementation runs: the names, the rule for ``implementation=None``, and one custom_vjp.

The choice by platform is made when the program is lowered, not by the machine that traces it, and
it stands inside the custom_vjp: whatever runs, the residuals are the same, namely the inputs and
the state before every chunk, under the names in `RESIDUAL_NAMES` for `jax.checkpoint` policies.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops.associative import associative
from deltaproduct_jax.ops.chunked import Settings, Tokens, chunked, chunked_backward
from deltaproduct_jax.ops.recurrent import recurrent
from deltaproduct_jax.ops.varying import mark_all_varying

AVAILABLE = ("chunked", "recurrent", "associative")

# A policy that saves the last two spares a rematerialised layer the second run of the scan.
RESIDUAL_NAMES = ("delta_product_inputs", "delta_product_states", "delta_product_outputs")

# Fewest and most updates (tokens times factors) in a chunk where the caller names no size.
UPDATES_PER_CHUNK = (16, 64)
# On a CPU the plain scan is faster up to this many entries of the state of one head.
SMALL_STATE = 32 * 32


def default_chunk_size(*, R: int, K: int, V: int) -> int:
    """Tokens in a chunk of the chunked implementation where the caller names none.

    Work inside a chunk grows with its updates C * R, work on the state with K and V, and both are
    in balance on a CPU near C * R = max(K, V) / 2. The same on every platform, because the kept
    states, one per chunk, are residuals and their number is fixed when the program is traced.
    """
    fewest, most = UPDATES_PER_CHUNK
    return max(1, min(max(max(K, V) // 2, fewest), most) // R)


def select_implementation(platform: str, *, T: int, K: int, V: int, differentiated: bool) -> str:
    """What ``implementation=None`` runs.

    Under differentiation it is always "chunked": the recurrence would store several states per
    token. Otherwise a single token runs "recurrent", and so does a CPU with a state of at most
    32 x 32 per head; all else runs "chunked".

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu": what the program is lowered for.
      T: tokens.
      K: key width.
      V: value width.
      differentiated: whether this is the forward pass of a gradient.

    Returns:
      The name of an implementation.
    """
    if differentiated:
        return "chunked"
    if T <= 1 or (platform == "cpu" and K * V <= SMALL_STATE):
        return "recurrent"
    return "chunked"


@functools.partial(jax.jit, static_argnames=("scale", "chunk_size", "precision", "implementation"))
def dispatch(
    q, k, v, beta, g, initial_state, resets, *, scale, chunk_size, precision, implementation
):
    """Runs the named implementation, or the one that the rule picks, on checked arguments."""
    B, T, R, _, K = k.shape
    if T == 0:
        return jnp.zeros((B, 0, *v.shape[3:]), v.dtype), initial_state
    tokens, initial_state = mark_all_varying((Tokens(q, k, v, beta, g, resets), initial_state))
    if implementation in ("recurrent", "associative"):
        run = recurrent if implementation == "recurrent" else associative
        return run(*tokens[:5], initial_state, tokens.resets, scale=scale, precision=precision)
    chunk_size = chunk_size or default_chunk_size(R=R, K=K, V=v.shape[-1])
    settings = Settings(scale, min(chunk_size, T), precision)
    return _with_own_backward(implementation, settings, tokens, initial_state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_own_backward(implementation, settings: Settings, tokens: Tokens, initial_state):
    def run_chunked(tokens, initial_state):
        return chunked(tokens, initial_state, settings, keep_states=False)[:2]

    def run_recurrent(tokens, initial_state):
        *arrays, resets = tokens
        options = {"scale": settings.scale, "precision": settings.precision}
        return recurrent(*arrays, initial_state, resets, **options)

    if implementation is not None:
        return run_chunked(tokens, initial_state)
    runs = {"chunked": run_chunked, "recurrent": run_recurrent}

    def choice(platform):
        T, (K, V) = tokens.q.shape[1], initial_state.shape[-2:]
        return runs[select_implementation(platform, T=T, K=K, V=V, differentiated=False)]

    others = choice("tpu")
    if choice("cpu") is others:
        return others(tokens, initial_state)
    return jax.lax.platform_dependent(tokens, initial_state, cpu=choice("cpu"), default=others)


def _forward(implementation, settings: Settings, tokens: Tokens, initial_state):
    del implementation  # the forward pass of a gradient is always chunked
    inputs_name, states_name, outputs_name = RESIDUAL_NAMES
    # Boolean resets take no part in differentiation and need no name.
    named = checkpoint_name(tokens._replace(resets=None), inputs_name)
    tokens = named._replace(resets=tokens.resets)
    o, final_state, states = chunked(tokens, initial_state, settings, keep_states=True)
    states = checkpoint_name(states, states_name)
    outputs = checkpoint_name((o, final_state), outputs_name)
    return outputs, (tokens, states)


def _backward(implementation, settings: Settings, residuals, cotangents):
    del implementation
    tokens, states = residuals
    return chunked_backward(tokens, states, *cotangents, settings)


_with_own_backward.defvjp(_forward, _backward)
