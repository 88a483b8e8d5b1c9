"""Which implementation runs: the names, the rule for ``implementation=None``, and one custom_vjp.

The choice by platform is made when the program is lowered, not by the machine that traces it, and
it stands inside the custom_vjp: whatever runs, the residuals are the same, namely the inputs and
the state before every span of chunks, under the names in `RESIDUAL_NAMES` for policies of
`jax.checkpoint`. Where one kernel alone may run beside "chunked", it says how many states there are
and what is kept beside them, which all else leaves empty.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.associative import associative
from deltaproduct_jax.ops.chunked import Settings, chunked, chunked_backward
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.precision import Matmul
from deltaproduct_jax.ops.recurrent import recurrent, recurrent_step
from deltaproduct_jax.ops.reverse_only import differentiated_once, reverse_only
from deltaproduct_jax.ops.tiling import default_chunk_size, default_span, tiling_for
from deltaproduct_jax.ops.unavailable import unavailable
from deltaproduct_jax.ops.varying import mark_all_varying, mark_varying_as

AVAILABLE = ("chunked", "recurrent", "associative", *kernels.KERNELS)

# A policy that saves the last two spares a rematerialised layer the second run of the scan.
RESIDUAL_NAMES = ("delta_product_inputs", "delta_product_states", "delta_product_outputs")

# The last stands for all others.
PLATFORMS = ("cpu", "tpu", "cuda", "default")


def select_implementation(
    platform: str,
    *,
    B: int,
    T: int,
    R: int,
    Hv: int,
    K: int,
    V: int,
    differentiated: bool,
    H: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    chunk_size: int | None = None,
    precision: str | None = None,
) -> str:
    """What ``implementation=None`` runs.

    The kernel of the platform, where there is one that supports these ("pallas_tpu" on TPU), for
    K and V from 64 on, several tokens, and no ``chunk_size``. Else, under differentiation, always
    "chunked": the recurrence would store several states per token. Otherwise a single token runs
    "recurrent", and so does a CPU where its small steps were measured to be faster (README.md has
    the figures): with one factor a token and states below 64 x 64, with several and states below
    128 x 128. All else runs "chunked"; so does what is lowered for a TPU on a machine without one,
    unless an abstract mesh (`jax.sharding.use_abstract_mesh`) says which TPU it is for, and what is
    lowered for a GPU with little shared memory (all but A100, H100, H200 and B200).

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu": what the program is lowered for.
      B: sequences.
      T: tokens.
      R: Householder factors a token.
      Hv: value heads.
      K: key width.
      V: value width.
      differentiated: whether this is the forward pass of a gradient.
      H: key heads; None: as many as value heads.
      dtype: of q, k and v.
      chunk_size: as in `delta_product`.
      precision: as in `delta_product`.

    Returns:
      The name of an implementation.
    """
    request = {"B": B, "T": T, "R": R, "H": H or Hv, "Hv": Hv, "K": K, "V": V}
    request |= {"dtype": jnp.dtype(dtype), "precision": precision}
    for name, kernel in kernels.KERNELS.items():
        if (
            platform == kernel.platform
            and chunk_size is None
            and T > 1
            and min(K, V) >= kernel.least_width
            and kernels.reason_against(name, **request) is None
        ):
            return name
    if differentiated:
        return "chunked"
    if T <= 1 or (platform == "cpu" and _scan_is_faster(R, K * V)):
        return "recurrent"
    return "chunked"


def _scan_is_faster(R: int, entries: int) -> bool:
    return entries < (64 * 64 if R == 1 else 128 * 128)


@functools.partial(jax.jit, static_argnames=("scale", "chunk_size", "precision", "implementation"))
def dispatch(
    q, k, v, beta, g, initial_state, resets, *, scale, chunk_size, precision, implementation
):
    """Runs the named implementation, or the one that the rule picks, on checked arguments."""
    B, T = k.shape[:2]
    if T == 0:
        return jnp.zeros((B, 0, *v.shape[3:]), v.dtype), initial_state
    tokens, initial_state = mark_all_varying((Tokens(q, k, v, beta, g, resets), initial_state))
    if implementation in kernels.KERNELS:
        _check_kernel(implementation, tokens, precision)
    if implementation in ("recurrent", "associative"):
        run = recurrent if implementation == "recurrent" else associative
        return run(*tokens[:5], initial_state, tokens.resets, scale=scale, precision=precision)
    request = Request(scale, precision, chunk_size, implementation)
    return _with_own_backward(request, *reverse_only((tokens, initial_state)))


def _check_kernel(name: str, tokens: Tokens, precision: str | None) -> None:
    reason = kernels.reason_against(name, **_sizes(tokens), precision=precision)
    if reason is not None:
        raise ValueError(
            f"implementation={name!r} cannot run this: {reason}; "
            "'chunked' can, and None chooses by platform and shape"
        )


def _sizes(tokens: Tokens) -> dict:
    """What `select_implementation` and kernels are asked with."""
    B, T, R, H, K = tokens.k.shape
    Hv, V = tokens.v.shape[-2:]
    dtype = jnp.dtype(tokens.q.dtype)
    return {"dtype": dtype, "B": B, "T": T, "R": R, "H": H, "Hv": Hv, "K": K, "V": V}


class Request(NamedTuple):
    """What the caller fixes, whatever the platform."""

    scale: float
    precision: str | None
    chunk_size: int | None
    implementation: str | None

    def name(self, platform: str, tokens: Tokens, *, differentiated: bool) -> str:
        """The implementation that runs on a platform."""
        if self.implementation is not None:
            return self.implementation
        name = select_implementation(
            platform,
            **_sizes(tokens),
            differentiated=differentiated,
            chunk_size=self.chunk_size,
            precision=self.precision,
        )
        unready = name in kernels.KERNELS and not kernels.load(name).is_ready()
        return "chunked" if unready else name

    def span(self, tokens: Tokens) -> int:
        """Tokens from one kept state to the next, unless a kernel keeps fewer."""
        _, T, R, _, K = tokens.k.shape
        if self.chunk_size is not None:
            return min(self.chunk_size, T)
        return default_span(tokens.q.dtype, T=T, R=R, K=K, V=tokens.v.shape[-1])

    def kept_span(self, tokens: Tokens) -> int:
        """Tokens from one kept state to the next: the residuals are the same on all platforms."""
        span, name = self.span(tokens), self.only_kernel(tokens)
        return span if name is None else kernels.load(name).kept_span(span, **_sizes(tokens))

    def only_kernel(self, tokens: Tokens) -> str | None:
        """The kernel that may run; None too if there are kernels of two platforms.

        Then each has to do with room for a state a span.
        """
        names = {self.name(platform, tokens, differentiated=True) for platform in PLATFORMS}
        chosen = names & kernels.KERNELS.keys()
        return next(iter(chosen)) if len(chosen) == 1 else None

    def kept_more(self, tokens: Tokens) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What is kept beside states."""
        name = self.only_kernel(tokens)
        return () if name is None else kernels.load(name).kept_more(tokens, self._options(tokens))

    def settings(self, platform: str, tokens: Tokens) -> Settings:
        """How the chunked implementation runs on a platform."""
        B, T, R, _, K = tokens.k.shape
        Hv, V = tokens.v.shape[-2:]
        dtype, span = tokens.q.dtype, self.kept_span(tokens)
        platform = platform if platform in ("cpu", "tpu") else "default"
        chunk_size = span
        if self.chunk_size is None:
            chunk_size = default_chunk_size(platform, dtype, T=T, R=R, K=K, V=V)
        # A CPU has no bfloat16: it would convert whole arrays anew for every chunk, and round every
        # operand only to widen it again.
        is_cpu = platform == "cpu"
        rule = Matmul.wide if is_cpu else Matmul.of
        tiling = tiling_for(platform, span, chunk_size, B=B, T=T, R=R, Hv=Hv, K=K, V=V)
        matmul = rule(dtype, self.precision)
        return Settings(
            self.scale,
            tiling,
            matmul,
            *Matmul.of_inverse_and_gates(platform, dtype, self.precision),
            widen=is_cpu,
            refine=not is_cpu and matmul.is_true_float32,
        )

    def options(self, platform: str, tokens: Tokens) -> kernels.Options:
        """How a kernel runs on a platform."""
        options = self._options(tokens)
        more = bool(self.kept_more(tokens))
        return options._replace(interpret=platform == "cpu", more=more)

    def _options(self, tokens: Tokens) -> kernels.Options:
        T = tokens.k.shape[1]
        spans, slots = -(-T // self.span(tokens)), -(-T // self.kept_span(tokens))
        return kernels.Options(self.scale, self.precision, spans, interpret=False, slots=slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_own_backward(request: Request, tokens: Tokens, initial_state):
    def choice(platform):
        name = request.name(platform, tokens, differentiated=False)
        if name == "recurrent":
            return functools.partial(_recurrent, scale=request.scale, precision=request.precision)
        return _run(name, "forward", request, platform, tokens, keep_states=False)

    return _by_platform(request.implementation, choice, tokens, initial_state)[:2]


def _recurrent(tokens: Tokens, initial_state, scale, precision):
    *arrays, resets = tokens
    return *recurrent(*arrays, initial_state, resets, scale=scale, precision=precision), None


def _run(name: str, direction: str, request: Request, platform: str, tokens: Tokens, **keywords):
    """The forward or backward pass of "chunked" or of a kernel; None where it cannot run."""
    if name == "chunked":
        settings, more = request.settings(platform, tokens), request.kept_more(tokens)
        if direction == "backward":
            return functools.partial(_chunked_backward, settings=settings)
        return functools.partial(_chunked, settings=settings, more=more, **keywords)
    kernel = kernels.KERNELS[name]
    if platform != kernel.platform and not (platform == "cpu" and kernel.interpreted):
        return None
    run = differentiated_once(getattr(kernels.load(name), direction))
    return functools.partial(run, options=request.options(platform, tokens), **keywords)


def _chunked(tokens: Tokens, initial_state, *, settings, more, keep_states):
    """`chunked` by the contract of kernels, with room for what it does not keep."""
    results = chunked(tokens, initial_state, settings, keep_states=keep_states)
    o, final_state, states = results
    if not keep_states:
        return results
    empty = (mark_varying_as(jnp.zeros(x.shape, x.dtype), o) for x in more)
    return o, final_state, (states, *empty)


def _chunked_backward(tokens: Tokens, kept, do, dfinal_state, *, settings):
    return chunked_backward(tokens, kept[0], do, dfinal_state, settings)


def _by_platform(name, choice, *operands):
    """Runs ``choice(platform)``, a partial, for the platform that the program is lowered for."""
    choices = {platform: choice(platform) for platform in PLATFORMS}
    runs = {platform: run for platform, run in choices.items() if run is not None}
    if len(runs) < len(choices):
        text = f"implementation={name!r} runs on {', '.join(runs)} only; 'chunked' runs anywhere"
        choices["default"] = unavailable(text, like=next(iter(runs.values())))
    others = choices.pop("default")
    different = {
        platform: run
        for platform, run in choices.items()
        if run is not None and not _same(run, others)
    }
    if not different:
        return others(*operands)
    return jax.lax.platform_dependent(*operands, default=others, **different)


def _same(x: functools.partial, y: functools.partial) -> bool:
    return (x.func, x.args, x.keywords) == (y.func, y.args, y.keywords)


def _forward(request: Request, tokens: Tokens, initial_state):
    inputs_name, states_name, outputs_name = RESIDUAL_NAMES
    # Boolean resets take no part in differentiation and need no name.
    named = checkpoint_name(tokens._replace(resets=None), inputs_name)
    tokens = named._replace(resets=tokens.resets)

    def choice(platform):
        name = request.name(platform, tokens, differentiated=True)
        return _run(name, "forward", request, platform, tokens, keep_states=True)

    o, final_state, kept = _by_platform(request.implementation, choice, tokens, initial_state)
    kept = checkpoint_name(kept, states_name)
    outputs = checkpoint_name((o, final_state), outputs_name)
    return outputs, (tokens, kept)


def _backward(request: Request, residuals, cotangents):
    tokens = residuals[0]

    def choice(platform):
        # What the forward pass ran: the states are its own.
        name = request.name(platform, tokens, differentiated=True)
        return _run(name, "backward", request, platform, tokens)

    return _by_platform(request.implementation, choice, *residuals, *cotangents)


_with_own_backward.defvjp(_forward, _backward)


def step(state, q, k, v, beta, g, *, scale):
    """One token, as `recurrent_step`; on CUDA by a kernel."""
    B, R, H, K = k.shape
    Hv, V = v.shape[-2:]
    sizes = {"dtype": q.dtype, "B": B, "T": 1, "R": R, "H": H, "Hv": Hv, "K": K, "V": V}
    if kernels.reason_against("triton", **sizes, precision=None):
        return recurrent_step(state, q, k, v, beta, g, scale=scale, precision=None)
    return _step(scale, state, q, k, v, beta, g)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _step(scale, *arrays):
    return jax.lax.platform_dependent(
        *arrays,
        cuda=functools.partial(kernels.load("triton").step, scale=scale),
        default=functools.partial(recurrent_step, scale=scale, precision=None),
    )


@_step.defjvp
def _step_jvp(scale, arrays, tangents):
    return jax.jvp(functools.partial(recurrent_step, scale=scale, precision=None), arrays, tangents)
