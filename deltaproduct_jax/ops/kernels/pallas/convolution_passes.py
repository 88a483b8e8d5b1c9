"""The TPU kernels of short convolutions: what they take, and what is launched on which arrays.

Letters: B sequences, T tokens, C channels, W taps. The bodies are in `convolution`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deltaproduct_jax.ops.convolution.plain import Form, identity, plain
from deltaproduct_jax.ops.kernels.pallas import convolution
from deltaproduct_jax.ops.kernels.pallas.convolution import EDGE, LANES, VIEW, Call, Scratch

MOST_TAPS = EDGE
MOST_CHANNELS = 16384
MOST_WIDTH = 512
MOST_TOKENS = 512
# Of one array of a block in float32. Backwards there are up to six of them, beside what has all
# channels of a few tokens: together less than the 16 MiB that every chip has.
BLOCK_BYTES = 3 * 2**19
# Tokens, times groups of 128 channels, that a turn of a kernel's loop works on: with fewer, terms
# wait for each other, and backwards registers are short as it is.
ROWS_FORWARD, ROWS_BACKWARD = 512, 256


def unsupported(form: Form, *, C: int, conv_size: int, dtype) -> str | None:
    """Why the kernels cannot run these, as the end of a sentence, or None."""
    width = form.unit_width
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"the dtype is {jnp.dtype(dtype)}; it takes bfloat16 and float32"
    if form.activation not in (jax.nn.silu, identity):
        return f"the activation is {form.activation.__name__}; it takes silu and none"
    if not 2 <= conv_size <= MOST_TAPS:
        return f"conv_size is {conv_size}; it takes 2 to {MOST_TAPS}"
    if C % LANES or C > MOST_CHANNELS:
        return f"there are {C} channels; it takes multiples of {LANES}, at most {MOST_CHANNELS}"
    if width is not None and ((width % LANES and LANES % width) or width > MOST_WIDTH):
        return (
            f"the width of a head is {width}; it takes divisors of {LANES} and its multiples up to "
            f"{MOST_WIDTH}"
        )
    return None


def forward(u, before, taps, run, past, *, form: Form, interpret: bool) -> jax.Array:
    """The convolution [B, T * C / 128, 128] in the dtype of ``u``.

    Args:
      u: inputs [B, T, C].
      before: the W - 1 inputs before them [B, W - 1, C].
      taps: [W, C], float32.
      run: numbers of segments [B, T], int32, or None.
      past: those of ``before`` [B, W - 1], or None.
      form: what is done to the sum of taps.
      interpret: run on a CPU.
    """
    call = _call(form, u, taps, run, interpret, reverse=False)
    operands, specs = _operands(call, u, before, taps, run, past, reverse=False)
    (y,) = _run(call, convolution.forward, operands, specs, [_rows(call, u)], reverse=False)
    return y


def backward(u, before, taps, run, past, dy, *, form: Form, interpret: bool):
    """Cotangents of ``u``, ``before`` and ``taps``, from that of `forward`."""
    call = _call(form, u, taps, run, interpret, reverse=True)
    operands, specs = _operands(call, u, before, taps, run, past, reverse=True)
    operands.append(dy.astype(u.dtype))
    specs.append(_rows(call, u, reverse=True)[0])
    B, _, C = u.shape
    W = call.taps
    out_taps = pl.BlockSpec((1, W, C), lambda b, n: (b, 0, 0))
    outs = [(_tokens(call, C, reverse=True), u.shape, u.dtype)]
    outs += [(out_taps, (B, W, C), jnp.float32)]
    du, parts = _run(call, convolution.backward, operands, specs, outs, reverse=True)
    return du, _before_back(form, u, before, taps, run, past, dy), jnp.sum(parts, axis=0)


def _before_back(form, u, before, taps, run, past, dy):
    """That of ``before``, which the first W - 1 tokens alone read."""
    B, T, C = u.shape
    first = min(T, before.shape[1])
    head = lambda x: None if x is None else x[:, :first]
    dy = dy[:, : first * C // LANES].reshape(B, first, C)
    of = lambda before: plain(form, head(u), before, taps, head(run), past)
    return jax.vjp(of, before)[1](dy)[0]


def _call(form: Form, u, taps, run, interpret: bool, *, reverse: bool) -> Call:
    _, T, C = u.shape
    tokens = MOST_TOKENS
    while tokens > VIEW and (tokens * C * 4 > BLOCK_BYTES or tokens >= 2 * T):
        tokens //= 2
    blocks = -(-T // tokens)
    is_silu = form.activation is not identity
    fixed = (C // LANES, taps.shape[0], is_silu, form.unit_width)
    call = Call(tokens, blocks, T, *fixed, 1, run is not None, u.dtype != jnp.float32, interpret)
    rows = ROWS_BACKWARD if reverse else ROWS_FORWARD
    return call._replace(at_once=min(call.heads, max(1, rows // (tokens * call.together))))


def _order(call: Call, reverse: bool):
    return (lambda n: call.blocks - 1 - n) if reverse else (lambda n: n)


def _tokens(call: Call, C: int, reverse: bool) -> pl.BlockSpec:
    at = _order(call, reverse)
    return pl.BlockSpec((1, call.tokens, C), lambda b, n: (b, at(n), 0))


def _rows(call: Call, u, reverse: bool = False):
    at = _order(call, reverse)
    spec = pl.BlockSpec((1, call.tokens * call.groups, LANES), lambda b, n: (b, at(n), 0))
    return spec, (u.shape[0], u.shape[1] * call.groups, LANES), u.dtype


def _operands(call: Call, u, before, taps, run, past, reverse: bool):
    """What both kernels read, and its blocks."""
    B, _, C = u.shape
    at = _order(call, reverse)
    operands, specs = [u], [_tokens(call, C, reverse)]
    if reverse:
        blocks = call.tokens // VIEW
        operands.append(u)
        view = lambda b, n: (b, jnp.maximum(at(n) * blocks - 1, 0), 0)
        specs.append(pl.BlockSpec((1, VIEW, C), view))
    missing = EDGE - before.shape[1]
    operands += [jnp.pad(before.astype(jnp.float32), ((0, 0), (missing, 0), (0, 0))), taps]
    specs += [pl.BlockSpec((1, EDGE, C), lambda b, n: (b, 0, 0))]
    specs += [pl.BlockSpec(taps.shape, lambda b, n: (0, 0))]
    if call.packed:
        codes = convolution.codes_of(run, past, call.taps)
        codes = jnp.pad(codes, ((0, 0), (0, call.blocks * call.tokens - call.length)))
        operands.append(codes.reshape(B, call.blocks, 1, call.tokens))
        specs.append(pl.BlockSpec((1, 1, 1, call.tokens), lambda b, n: (b, at(n), 0, 0)))
    return operands, specs


def _run(call: Call, body, operands, specs, outs, *, reverse: bool):
    out_specs, shapes, dtypes = zip(*outs, strict=True)
    varying = jax.typeof(operands[0]).manual_axis_type
    out_shape = [
        jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    f32 = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    codes = pltpu.VMEM((call.tokens if call.packed else 8, LANES), jnp.int32)
    scratch = Scratch(
        f32(call.at_once, call.together, EDGE + call.tokens, LANES),
        f32(call.groups, EDGE, LANES),
        f32(call.tokens * call.groups if call.narrow else EDGE, LANES),
        codes,
        f32(call.at_once, call.tokens + EDGE, LANES),
    )
    return pl.pallas_call(
        functools.partial(body, call=call),
        grid=(operands[0].shape[0], call.blocks),
        in_specs=specs,
        out_specs=list(out_specs),
        out_shape=out_shape,
        scratch_shapes=list(scratch if reverse else scratch[:-1]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=call.interpret,
        # Who counts what a program moves reads it: one name, one cut.
        name=f"short_convolution_{'backward' if reverse else 'forward'}_{call.groups * LANES}",
    )(*operands)
