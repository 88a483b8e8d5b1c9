"""Runs a short convolution by what was chosen for it: one custom_vjp around the platforms.

As in `ops.dispatch` the choice is made when the program is lowered. What is kept for a gradient is
the inputs alone: the sum of taps is made again.
"""

import functools

import jax

from deltaproduct_jax.ops.convolution.plain import Form, plain, plain_activated
from deltaproduct_jax.ops.convolution.selection import Choice
from deltaproduct_jax.ops.kernels.triton import convolution_passes as of_triton
from deltaproduct_jax.ops.parts import on_each_part, with_past
from deltaproduct_jax.ops.reverse_only import differentiated_once
from deltaproduct_jax.ops.unavailable import unavailable
from deltaproduct_jax.ops.varying import mark_all_varying

# Name of what a kernel made, for policies of `jax.checkpoint`.
POINT = "short_convolution"
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
      ValueError: the unit width does not divide the last axis of ``u``.
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
        return _jitted(choice, form, *given)

    return on_each_part(on_device, arrays, layouts, layouts["u"])


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
    runs = functools.partial(_kernel, form=form), functools.partial(plain, form)
    return _by_platform(choice, *runs, u, before, taps, run, past)


def _forward_rule(choice, form, *arrays):
    return _with_own_backward(choice, form, *arrays), arrays


def _backward_rule(choice, form, arrays, dy):
    runs = functools.partial(_kernel_back, form=form), functools.partial(_plain_back, form)
    return *_by_platform(choice, *runs, *arrays, dy), None, None


_with_own_backward.defvjp(_forward_rule, _backward_rule)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _activated_jitted(choice, form, u):
    return _activated(choice, form, u)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _activated(choice, form, u):
    run = differentiated_once(of_triton.activated, NO_SECOND_DERIVATIVE)
    kernel = lambda u: run(u, form=form)
    return _by_platform(choice, kernel, functools.partial(plain_activated, form), u)


def _activated_forward(choice, form, u):
    return _activated(choice, form, u), u


def _activated_backward(choice, form, u, dy):
    run = differentiated_once(of_triton.activated_back, NO_SECOND_DERIVATIVE)
    kernel = lambda u, dy: run(u, dy, form=form)
    others = lambda u, dy: jax.vjp(functools.partial(plain_activated, form), u)[1](dy)[0]
    return (_by_platform(choice, kernel, others, u, dy),)


_activated.defvjp(_activated_forward, _activated_backward)


def _plain_back(form, u, before, taps, run, past, dy):
    run_plain = lambda u, before, taps: plain(form, u, before, taps, run, past)
    return jax.vjp(run_plain, u, before, taps)[1](dy)


def _kernel(*arrays, form):
    u, *others = arrays
    run = differentiated_once(of_triton.forward, NO_SECOND_DERIVATIVE)
    return run(*_flat(u, *others), form=form).reshape(u.shape)


def _kernel_back(*arrays, form):
    *arrays, dy = arrays
    run = differentiated_once(of_triton.backward, NO_SECOND_DERIVATIVE)
    flat = _flat(*arrays)
    results = run(*flat, dy.reshape(flat[0].shape), form=form)
    return tuple(x.reshape(like.shape) for x, like in zip(results, arrays, strict=False))


def _flat(u, before, taps, run, past):
    """The arrays with all channels along one axis, and the taps as one set of them."""
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    return flat(u), flat(before), taps.reshape(1, taps.shape[0], -1), run, past


def _by_platform(choice, kernel, others, *arrays):
    """``kernel(*arrays)`` on an NVIDIA GPU; elsewhere ``others``, unless the kernel was named."""
    if choice.named is not None:
        text = f"conv_implementation={choice.named!r} runs on cuda only; 'plain' runs anywhere"
        others = unavailable(text, like=others)
    return jax.lax.platform_dependent(*arrays, cuda=kernel, default=others)
