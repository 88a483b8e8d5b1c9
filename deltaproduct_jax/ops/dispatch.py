"""One custom_vjp around the choice by platform.

The choice is made when the program is lowered, not by the machine that traces it, and it stands
inside the custom_vjp: whatever runs, the residuals are the same, namely the inputs and the state
before every span of chunks, under the names in `RESIDUAL_NAMES` for policies of `jax.checkpoint`.
Where one kernel alone may run beside "chunked", it says how many states there are and what is kept
beside them; all else leaves that room empty. `resolve` says what may run.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.associative import associative
from deltaproduct_jax.ops.chunked import chunked, chunked_backward
from deltaproduct_jax.ops.containment import contained, only_finite
from deltaproduct_jax.ops.convolution.raw import entered
from deltaproduct_jax.ops.decays import forgets
from deltaproduct_jax.ops.kernels import containment as of_kernels
from deltaproduct_jax.ops.kernels.containment import watched as _watched
from deltaproduct_jax.ops.layout import Tokens, head_axes, mark_bad
from deltaproduct_jax.ops.recurrent import (
    recurrent,
    recurrent_in_spans,
    recurrent_in_spans_backward,
    recurrent_step,
)
from deltaproduct_jax.ops.reverse_only import differentiated_once, reverse_only
from deltaproduct_jax.ops.route import Branch, Route, resolve, sizes_of
from deltaproduct_jax.ops.unavailable import asked_when_lowered, unavailable
from deltaproduct_jax.ops.varying import mark_all_varying, mark_varying_as

# A policy that saves the last two spares a rematerialised layer the second run of the scan.
RESIDUAL_NAMES = ("delta_product_inputs", "delta_product_states", "delta_product_outputs")
# What runs anywhere, forward and backward, with the same residuals.
PLAIN = {
    "chunked": (chunked, chunked_backward),
    "recurrent": (recurrent_in_spans, recurrent_in_spans_backward),
}


@functools.partial(
    jax.jit,
    static_argnames=(
        *("scale", "chunk_size", "precision", "implementation"),
        *("check_state", "known_finite", "raw"),
    ),
)
def dispatch(
    q,
    k,
    v,
    beta,
    g,
    initial_state,
    resets,
    *,
    scale,
    chunk_size,
    precision,
    implementation,
    check_state=True,
    known_finite=False,
    raw=False,
):
    """Runs the named implementation, or the one that the rule picks, on checked arguments.

    If ``raw`` they are to go through `raw.entered` first, which a kernel may do.
    """
    B, T = k.shape[:2]
    if 0 in (B, T):
        return jnp.zeros((B, T, *v.shape[3:]), v.dtype), initial_state
    if implementation != "recurrent" and not isinstance(T, int):
        raise ValueError(
            f"implementation={implementation!r} cannot run T={T}, a symbolic length: "
            "how a sequence is cut depends on it; 'recurrent' can, and B may be symbolic everywhere"
        )
    tokens, initial_state = mark_all_varying((Tokens(q, k, v, beta, g, resets), initial_state))
    resets = tokens.resets
    if implementation in kernels.KERNELS:
        _check_kernel(implementation, tokens, precision)
    if implementation in ("recurrent", "associative"):
        tokens = entered(tokens) if raw else tokens
        form = recurrent if implementation == "recurrent" else associative

        def run(tokens, state):
            tokens = tokens if form is recurrent else only_finite(tokens)  # it sees to that itself
            return form(*tokens[:5], state, resets, scale=scale, precision=precision)
    else:
        options = {"scale": scale, "precision": precision, "chunk_size": chunk_size}
        route = resolve(tokens, **options, implementation=implementation, raw=raw)
        tokens = entered(tokens) if raw and not route.raw else tokens
        if route.may_run_kernel:
            route = route.for_finite(known_finite)
            # To look at all arrays first would be a pass over memory, and so would `forgets` be:
            # each platform sees to it.
            tokens = tokens._replace(resets=resets)
            return _with_own_backward(route, *reverse_only((tokens, initial_state)))

        def run(tokens, state):
            tokens, state = reverse_only((tokens, state))
            return _with_own_backward(route, tokens._replace(resets=resets), state)

    tokens = tokens._replace(g=forgets(tokens.g), resets=None)
    settings = {"head_axes": head_axes(tokens), "check_state": check_state, "mark": mark_bad}
    settings["asks_first"] = True
    return contained(run, tokens, initial_state, resets, **settings)


def _check_kernel(name: str, tokens: Tokens, precision: str | None) -> None:
    dtype = jnp.dtype(tokens.q.dtype)
    reason = kernels.reason_against(name, **sizes_of(tokens), dtype=dtype, precision=precision)
    if reason is not None:
        raise ValueError(
            f"implementation={name!r} cannot run this: {reason}; "
            "'chunked' can, and None chooses by platform and shape"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_own_backward(route: Route, tokens: Tokens, initial_state):
    def choice(branch):
        return _forward_of(branch.primal, route, branch, keep_states=False)

    return _by_platform(route, choice, tokens, initial_state)[:2]


def _forward_rule(route: Route, tokens: Tokens, initial_state):
    inputs_name, states_name, outputs_name = RESIDUAL_NAMES
    # Boolean resets take no part in differentiation and need no name.
    named = checkpoint_name(tokens._replace(resets=None), inputs_name)
    tokens = named._replace(resets=tokens.resets)

    def choice(branch):
        return _forward_of(branch.gradient, route, branch, keep_states=True)

    o, final_state, kept = _by_platform(route, choice, tokens, initial_state)
    kept = checkpoint_name(kept, states_name)
    outputs = checkpoint_name((o, final_state), outputs_name)
    return outputs, (tokens, kept)


def _backward_rule(route: Route, residuals, cotangents):
    return _by_platform(route, functools.partial(_backward_of, route), *residuals, *cotangents)


_with_own_backward.defvjp(_forward_rule, _backward_rule)


def _forward_of(name: str, route: Route, branch: Branch, *, keep_states: bool):
    """The forward pass of "chunked", of the scan or of a kernel; None where it cannot run."""
    if name in PLAIN:
        keywords = {"form": PLAIN[name][0], "settings": branch.settings, "more": route.kept_more}
        keywords |= {"confines": route.may_run_kernel, "raw": route.raw}
        return functools.partial(_run_plain, **keywords, keep_states=keep_states)
    return _kernel_pass(name, "forward", branch, keep_states=keep_states)


def _backward_of(route: Route, branch: Branch):
    """The backward pass of what ran forward, whose states are its own; None if it cannot run."""
    if branch.gradient in PLAIN:
        keywords = {"form": PLAIN[branch.gradient][1], "settings": branch.settings}
        keywords |= {"confines": route.may_run_kernel, "raw": route.raw}
        return functools.partial(_run_plain_backward, **keywords)
    return _kernel_pass(branch.gradient, "backward", branch)


def _kernel_pass(name: str, direction: str, branch: Branch, **keywords):
    kernel, platform = kernels.KERNELS[name], branch.platform
    if platform != kernel.platform and not (platform == "cpu" and kernel.interpreted):
        return None
    run = getattr(of_kernels, direction)
    reason = getattr(kernels.load(name), "reason_when_lowered", None)
    if reason is not None and platform == kernel.platform:
        run = _asked(name, reason, run)
    keywords |= {"kernel": kernels.load(name), "options": branch.options}
    return functools.partial(differentiated_once(run), **keywords)


@functools.cache
def _asked(name: str, reason, run):
    """``run(tokens, ...)``, a pass of a kernel; where it cannot be lowered an error says why."""
    text = f"implementation={name!r} cannot run this; 'chunked' can"

    def asked(tokens, *arrays, **options):
        tokens = tokens._replace(q=asked_when_lowered(tokens.q, text, reason))
        return run(tokens, *arrays, **options)

    return asked


def _run_plain(tokens: Tokens, initial_state, *, form, settings, more, confines, raw, keep_states):
    """A plain form by the contract of kernels, with room for what it does not keep."""
    watched, state = None, initial_state
    if confines:
        tokens = tokens._replace(g=forgets(tokens.g))
        watched = _watched(tokens, initial_state)
        tokens, state = mark_bad(tokens, watched.bad), only_finite(initial_state)
    tokens = entered(tokens) if raw else tokens
    o, final_state, states = form(tokens, state, settings, keep_states=keep_states)
    if watched is not None:
        o, final_state = watched.spoil(o, final_state)
    if not keep_states:
        return o, final_state, None
    if watched is not None:  # the way back is to know whether it was bad
        states = states.at[0].set(initial_state.reshape(states.shape[1:]))
    empty = (mark_varying_as(jnp.zeros(x.shape, x.dtype), o) for x in more)
    return o, final_state, (states, *empty)


def _run_plain_backward(tokens: Tokens, kept, do, dfinal_state, *, form, settings, confines, raw):
    states = kept[0]
    if raw:
        form = functools.partial(_entered_backward, form)
    if not confines:
        return form(tokens, states, do, dfinal_state, settings)
    tokens = tokens._replace(g=forgets(tokens.g))
    watched = _watched(tokens, states[0].reshape(dfinal_state.shape))
    tokens, states = mark_bad(tokens, watched.bad), only_finite(states)
    cotangents, told = watched.finite_cotangents(do, dfinal_state)
    dtokens, dstate = form(tokens, states, *cotangents, settings)
    return watched.spoil_gradients(dtokens._replace(resets=None), dstate, told)


def _entered_backward(form, tokens: Tokens, *others):
    """Cotangents of what `entered` takes."""

    def of_three(q, k, v):
        return entered(tokens._replace(q=q, k=k, v=v))[:3]

    found, pull = jax.vjp(of_three, *tokens[:3])
    dtokens, dstate = form(Tokens(*found, *tokens[3:]), *others)
    return Tokens(*pull(dtokens[:3]), *dtokens[3:]), dstate


def _by_platform(route: Route, choice, *operands):
    """Runs ``choice(branch)``, a partial, for the platform that the program is lowered for."""
    choices = {branch.platform: choice(branch) for branch in route.branches}
    runs = {platform: run for platform, run in choices.items() if run is not None}
    if len(runs) < len(choices):
        text = f"implementation={route.named!r} runs on {', '.join(runs)} only"
        text += "; 'chunked' runs anywhere"
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
