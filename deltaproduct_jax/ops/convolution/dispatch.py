"""Runs a short convolution by what was chosen for it: one custom_vjp around the platforms.

As in `ops.dispatch` the choice is made when the program is lowered. What is kept for a gradient is
the inputs alone: the sum of taps is made again.
"""

import functools

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.convolution.plain import Form, plain, plain_activated
from deltaproduct_jax.ops.convolution.selection import Choice, for_part, of_tpu
from deltaproduct_jax.ops.kernels import load
from deltaproduct_jax.ops.kernels.triton import convolution_passes as of_triton
from deltaproduct_jax.ops.parts import on_each_part, with_past
from deltaproduct_jax.ops.reverse_only import differentiated_once
from deltaproduct_jax.ops.unavailable import asked_when_lowered, unavailable
from deltaproduct_jax.ops.varying import mark_all_varying

# Names for policies of `jax.checkpoint`: of what a kernel made, and of what the one product reads
# whose parts it takes where they lie.
POINT, READ_POINT = "short_convolution", "read_together"
NO_SECOND_DERIVATIVE = (
    "short convolution: kernels have a backward pass that cannot be differentiated again; name "
    'conv_implementation="plain" for second derivatives'
)
NAMES = ("u", "before", "taps", "run", "past")


def short_convolution(
    choice: Choice,
    form: Form,
    u: jax.Array,
    before: jax.Array,
    taps: jax.Array,
    run: jax.Array | None,
    past: jax.Array | None,
) -> jax.Array:
    """The convolution of `plain`, with its arguments, by a kernel where one is chosen.

    Of a kernel there is no forward mode and no second derivative. A batch may lie over explicit
    axes of a mesh; whatever else is cut is the caller's to run on each device.

    Raises:
      ValueError: the unit width does not divide the last axis of ``u``, or a kernel that is named
        cannot run these.
    """
    _check_width(form, u)
    arrays = dict(zip(NAMES, (u, before, taps, run, past), strict=True))
    if not choice.may_run_kernel:
        return plain(form, **arrays)
    channels = ("C",) * (u.ndim - 2)
    layouts = {"u": ("B", "T", *channels), "before": ("B", "W", *channels), "run": ("B", "T")}
    layouts |= {"taps": ("W", *channels), "past": ("B", "W")}

    def on_device(arrays):
        given = mark_all_varying(tuple(arrays[name] for name in NAMES))
        flat = _flat(*given)
        here = for_part(choice, form, flat[0], conv_size=taps.shape[0])
        return _jitted(here, form, *flat).reshape(given[0].shape)

    check_vma = not choice.is_interpreted
    return on_each_part(on_device, arrays, layouts, layouts["u"], check_vma=check_vma)


def convolved_parts(
    choice: Choice,
    parts: tuple[Form, ...],
    widths: tuple[int, ...],
    u: jax.Array,
    before: jax.Array,
    taps: jax.Array,
    run: jax.Array | None,
    past: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Convolutions of q, k and v that stand side by side, where a GPU runs a kernel for them.

    As they are read where they lie, one product can make all of them and more, with one cotangent.
    A device of a mesh runs it on its own tokens and heads; arrays lie over no explicit axis.

    Args:
      choice: what computes them.
      parts: what is done to q, k and v; the first two alike, with a unit width, the last without.
      widths: channels of each, C in all; multiples of that width.
      u: inputs [B, T, C and more].
      before: the W - 1 inputs before them [B, W - 1, C].
      taps: [W, C], in float32 at least.
      run, past: as of `plain`.

    Returns:
      q, k, v, and what ``u`` has behind them, as it is: [B, T, channels] each.
    """
    given = mark_all_varying((u, before, taps, run, past))
    return _parts_jitted(choice, parts, widths, *given)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _parts_jitted(choice, parts, widths, *arrays):
    return _parts(choice, parts, widths, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _parts(choice, parts, widths, u, before, taps, run, past):
    run_pass = differentiated_once(of_triton.forward_parts, NO_SECOND_DERIVATIVE)

    given = u, before, taps, run, past

    def kernel(u, before, taps, run, past):
        return tuple(run_pass(u, before, taps[None], run, past, parts=parts, widths=widths))

    found = _run(choice, *_ways(choice, kernel, "forward", parts, widths), *given)
    return *found, u[..., taps.shape[1] :]


def _parts_forward(choice, parts, widths, *arrays):
    return _parts(choice, parts, widths, *arrays), arrays


def _parts_backward(choice, parts, widths, arrays, cotangents):
    run_pass = differentiated_once(of_triton.backward_parts, NO_SECOND_DERIVATIVE)

    def kernel(u, before, taps, run, past, *cotangents):
        arrays, options = (u, before, taps[None], run, past), {"parts": parts, "widths": widths}
        du, dbefore, dtaps = run_pass(*arrays, cotangents[:-1], cotangents[-1], **options)
        return du, dbefore, dtaps[0]

    ways = _ways(choice, kernel, "backward", parts, widths)
    return *_run(choice, *ways, *arrays, *cotangents), None, None


_parts.defvjp(_parts_forward, _parts_backward)


def _ways(choice, on_gpu, direction, parts, widths):
    """What platforms run, and all others: there each convolution is one of its own."""
    one = {"forward": plain, "backward": _plain_back}[direction]
    others = functools.partial(_one_by_one, one, parts, widths)
    runs = {"cuda": on_gpu}
    if choice.on_tpu == "pallas_tpu":
        one = functools.partial(_by_pallas, direction, interpret=False)
        runs["tpu"] = functools.partial(_one_by_one, one, parts, widths)
    return runs, others


def _one_by_one(one, parts, widths, u, before, taps, run, past, *cotangents):
    """A pass of each, ``one(form, *arrays)``; cotangents are put together again."""
    found, at = [], 0
    for index, (form, width) in enumerate(zip(parts, widths, strict=True)):
        of_part = (x[..., at : at + width] for x in (u, before, taps))
        found.append(one(form, *of_part, run, past, *cotangents[index : index + 1]))
        at += width
    if not cotangents:
        return tuple(found)
    du, dbefore, dtaps = zip(*found, strict=True)
    du = (*du, cotangents[-1])
    return tuple(jnp.concatenate(x, axis=-1) for x in (du, dbefore, dtaps))


def activated(choice: Choice, form: Form, u: jax.Array) -> jax.Array:
    """What `short_convolution` does behind its taps, where there are none.

    Of a kernel there is no forward mode and no second derivative.

    Args:
      choice: what computes it.
      form: with a unit width, which divides the last axis of ``u``.
      u: inputs [B, T, *channels].

    Raises:
      ValueError: the unit width does not divide the last axis of ``u``.
    """
    _check_width(form, u)
    if not choice.may_run_kernel:
        return plain_activated(form, u)
    layout = ("B", "T", *("C",) * (u.ndim - 2))

    def on_device(arrays):
        return _activated_jitted(choice, form, *mark_all_varying((arrays["u"],)))

    def on_piece(u, _):
        return on_each_part(on_device, {"u": u}, {"u": layout}, layout)

    return with_past(on_piece, u, u[:, :0], on_each_device=True)


def _check_width(form: Form, u: jax.Array) -> None:
    if form.unit_width is not None and u.shape[-1] % form.unit_width:
        raise ValueError(
            f"u of shape {u.shape} ends in {u.shape[-1]} channels, which must be a multiple of "
            f"unit_width={form.unit_width}"
        )


# Lowered even where a user jits nothing: what cannot run is told then.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _jitted(choice, form, *arrays):
    return _with_own_backward(choice, form, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_own_backward(choice, form, u, before, taps, run, past):
    return _by_platform(choice, "forward", plain, form, u, before, taps, run, past)


def _forward_rule(choice, form, *arrays):
    return _with_own_backward(choice, form, *arrays), arrays


def _backward_rule(choice, form, arrays, dy):
    return *_by_platform(choice, "backward", _plain_back, form, *arrays, dy), None, None


_with_own_backward.defvjp(_forward_rule, _backward_rule)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _activated_jitted(choice, form, u):
    return _activated(choice, form, u)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _activated(choice, form, u):
    run = differentiated_once(of_triton.activated, NO_SECOND_DERIVATIVE)
    kernel = lambda u: run(u, form=form)
    return _run(choice, {"cuda": kernel}, functools.partial(plain_activated, form), u)


def _activated_forward(choice, form, u):
    return _activated(choice, form, u), u


def _activated_backward(choice, form, u, dy):
    run = differentiated_once(of_triton.activated_back, NO_SECOND_DERIVATIVE)
    kernel = lambda u, dy: run(u, dy, form=form)
    others = lambda u, dy: jax.vjp(functools.partial(plain_activated, form), u)[1](dy)[0]
    return (_run(choice, {"cuda": kernel}, others, u, dy),)


_activated.defvjp(_activated_forward, _activated_backward)


def _plain_back(form, u, before, taps, run, past, dy):
    run_plain = lambda u, before, taps: plain(form, u, before, taps, run, past)
    return jax.vjp(run_plain, u, before, taps)[1](dy)


def _flat(u, before, taps, run, past):
    """The arrays with all channels along one axis."""
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    return flat(u), flat(before), taps.reshape(taps.shape[0], -1), run, past


def _by_platform(choice, direction, on_others, form, *arrays):
    """A pass by the kernel of the platform; elsewhere plainly, unless a kernel was named."""
    others = functools.partial(on_others, form)
    runs = {}
    if choice.on_cuda == "triton":
        runs["cuda"] = functools.partial(_by_triton, direction, form)
    if choice.on_tpu == "pallas_tpu":
        runs["tpu"] = functools.partial(_by_pallas, direction, form, interpret=False)
    if choice.named == "pallas_tpu":
        runs["cpu"] = functools.partial(_by_pallas, direction, form, interpret=True)
    return _run(choice, runs, others, *arrays)


def _run(choice, runs, others, *arrays):
    if choice.named is not None:
        text = f"conv_implementation={choice.named!r} runs on {', '.join(runs)} only"
        others = unavailable(f"{text}; 'plain' runs anywhere", like=others)
    return jax.lax.platform_dependent(*arrays, **runs, default=others)


def _by_triton(direction, form, u, before, taps, run, past, *dy):
    """Taps are one set of several."""
    run_pass = differentiated_once(getattr(of_triton, direction), NO_SECOND_DERIVATIVE)
    results = run_pass(u, before, taps[None], run, past, *dy, form=form)
    return (*results[:2], results[2][0]) if dy else results


def _by_pallas(direction, form, u, before, taps, run, past, *dy, interpret):
    """Outputs and their cotangents are rows of 128 channels, which heads are for free."""
    kernels = of_tpu()
    rows = (x.reshape(x.shape[0], -1, kernels.LANES) for x in dy)
    run_pass = differentiated_once(_asked(direction, interpret), NO_SECOND_DERIVATIVE)
    results = run_pass(u, before, taps, run, past, *rows, form=form, interpret=interpret)
    return results if dy else results.reshape(u.shape)


@functools.cache
def _asked(direction, interpret):
    """A pass of the kernels for TPUs; where it cannot be lowered for one an error says why."""
    run_pass, reason = getattr(of_tpu(), direction), load("pallas_tpu").reason_when_lowered
    text = "conv_implementation='pallas_tpu' cannot run this; 'plain' can"

    def asked(u, *arrays, **options):
        return run_pass(asked_when_lowered(u, text, reason), *arrays, **options)

    return run_pass if interpret else asked
