"""Which implementation runs: the names, the rule for ``implementation=None``, and one custom_vjp.

The choice by platform is made when the program is lowered, not by the machine that traces it, and
it stands inside the custom_vjp: whatever runs, the residuals are the same, namely the inputs and
the state before every span of chunks, under the names in `RESIDUAL_NAMES` for policies of
`jax.checkpoint`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops.associative import associative
from deltaproduct_jax.ops.chunked import Settings, chunked, chunked_backward
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.precision import Matmul
from deltaproduct_jax.ops.recurrent import recurrent
from deltaproduct_jax.ops.tiling import default_chunk_size, default_span, tiling_for
from deltaproduct_jax.ops.varying import mark_all_varying

AVAILABLE = ("chunked", "recurrent", "associative")

# A policy that saves the last two spares a rematerialised layer the second run of the scan.
RESIDUAL_NAMES = ("delta_product_inputs", "delta_product_states", "delta_product_outputs")

# Entries of the states of all heads from which on they leave the cache of a CPU core, and the plain
# scan over tokens, which passes them once a token, falls behind.
CACHED_STATES = 2**17


def select_implementation(
    platform: str, *, B: int, T: int, R: int, Hv: int, K: int, V: int, differentiated: bool
) -> str:
    """What ``implementation=None`` runs.

    Under differentiation it is always "chunked": the recurrence would store several states per
    token. Otherwise a single token runs "recurrent", and so does a CPU where its small steps were
    measured to be faster (README.md has the figures): with states up to 16 x 16; and, while all
    states together have fewer than 2^17 entries, with states below 64 x 64, or below 128 x 128 if
    there are several factors a token. All else runs "chunked".

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu": what the program is lowered for.
      B: sequences.
      T: tokens.
      R: Householder factors a token.
      Hv: value heads.
      K: key width.
      V: value width.
      differentiated: whether this is the forward pass of a gradient.

    Returns:
      The name of an implementation.
    """
    if differentiated:
        return "chunked"
    if T <= 1 or (platform == "cpu" and _scan_is_faster(B * Hv, R, K * V)):
        return "recurrent"
    return "chunked"


def _scan_is_faster(states: int, R: int, entries: int) -> bool:
    if entries <= 16 * 16:
        return True
    most = 64 * 64 if R == 1 else 128 * 128
    return states * entries < CACHED_STATES and entries < most


@functools.partial(jax.jit, static_argnames=("scale", "chunk_size", "precision", "implementation"))
def dispatch(
    q, k, v, beta, g, initial_state, resets, *, scale, chunk_size, precision, implementation
):
    """Runs the named implementation, or the one that the rule picks, on checked arguments."""
    B, T = k.shape[:2]
    if T == 0:
        return jnp.zeros((B, 0, *v.shape[3:]), v.dtype), initial_state
    tokens, initial_state = mark_all_varying((Tokens(q, k, v, beta, g, resets), initial_state))
    if implementation in ("recurrent", "associative"):
        run = recurrent if implementation == "recurrent" else associative
        return run(*tokens[:5], initial_state, tokens.resets, scale=scale, precision=precision)
    request = Request(scale, precision, chunk_size, implementation)
    return _with_own_backward(request, tokens, initial_state)


class Request(NamedTuple):
    """What the caller fixes, whatever the platform."""

    scale: float
    precision: str | None
    chunk_size: int | None
    implementation: str | None

    def settings(self, platform: str, tokens: Tokens) -> Settings:
        """How the chunked implementation runs on a platform."""
        B, T, R, _, K = tokens.k.shape
        Hv, V = tokens.v.shape[-2:]
        dtype = tokens.q.dtype
        if self.chunk_size is None:
            sizes = {"T": T, "R": R, "K": K, "V": V}
            span = default_span(dtype, **sizes)
            chunk_size = default_chunk_size(platform, dtype, **sizes)
        else:
            span = chunk_size = min(self.chunk_size, T)
        # A CPU has no bfloat16: it would convert whole arrays anew for every chunk, and round every
        # operand only to widen it again.
        is_cpu = platform == "cpu"
        rule = Matmul.wide if is_cpu else Matmul.of
        tiling = tiling_for(platform, span, chunk_size, B=B, T=T, R=R, Hv=Hv, K=K, V=V)
        return Settings(
            self.scale,
            tiling,
            rule(dtype, self.precision),
            *Matmul.of_inverse_and_gates(platform, dtype, self.precision),
            widen=is_cpu,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_own_backward(request: Request, tokens: Tokens, initial_state):
    def choice(platform):
        name = request.implementation
        if name is None:
            B, T, R = tokens.k.shape[:3]
            Hv, K, V = initial_state.shape[1:]
            sizes = {"B": B, "T": T, "R": R, "Hv": Hv, "K": K, "V": V}
            name = select_implementation(platform, **sizes, differentiated=False)
        if name == "chunked":
            settings = request.settings(platform, tokens)
            return functools.partial(_chunked, settings=settings)
        return functools.partial(_recurrent, scale=request.scale, precision=request.precision)

    return _by_platform(choice, tokens, initial_state)


def _chunked(tokens: Tokens, initial_state, settings: Settings):
    return chunked(tokens, initial_state, settings, keep_states=False)[:2]


def _recurrent(tokens: Tokens, initial_state, scale, precision):
    *arrays, resets = tokens
    return recurrent(*arrays, initial_state, resets, scale=scale, precision=precision)


def _by_platform(choice, *operands):
    """Runs ``choice(platform)``, a partial, for the platform that the program is lowered for."""
    choices = {platform: choice(platform) for platform in ("cpu", "tpu", "default")}
    others = choices.pop("default")
    different = {platform: run for platform, run in choices.items() if not _same(run, others)}
    if not different:
        return others(*operands)
    return jax.lax.platform_dependent(*operands, default=others, **different)


def _same(x: functools.partial, y: functools.partial) -> bool:
    return x.func is y.func and x.keywords == y.keywords


def _forward(request: Request, tokens: Tokens, initial_state):
    inputs_name, states_name, outputs_name = RESIDUAL_NAMES
    # Boolean resets take no part in differentiation and need no name.
    named = checkpoint_name(tokens._replace(resets=None), inputs_name)
    tokens = named._replace(resets=tokens.resets)

    def choice(platform):
        settings = request.settings(platform, tokens)
        return functools.partial(chunked, settings=settings, keep_states=True)

    o, final_state, states = _by_platform(choice, tokens, initial_state)
    states = checkpoint_name(states, states_name)
    outputs = checkpoint_name((o, final_state), outputs_name)
    return outputs, (tokens, states)


def _backward(request: Request, residuals, cotangents):
    def choice(platform):
        return functools.partial(
            chunked_backward, settings=request.settings(platform, residuals[0])
        )

    return _by_platform(choice, *residuals, *cotangents)


_with_own_backward.defvjp(_forward, _backward)
