"""The loss of a batch: cross entropy of the next answer, whole or in chunks, and the z-loss.

With a large vocabulary the logits of a batch are its largest array by far: 8 x 4,096 tokens and
32,000 ids are 4 GiB in float32, and their gradient as much again. In chunks they exist for a few
thousand tokens at a time. Since the loss is the last thing that a model computes, a chunk's
gradient is taken right away, so that its logits are computed once, and never again backwards.

Shape suffixes: B batch, T tokens, D model width, V vocabulary; N chunks of C tokens of each of b
rows, in X by Y groups that lie on different devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.ops.blocks import rows
from deltaproduct_jax.ops.parts import explicit_names
from deltaproduct_jax.ops.precision import accumulator_dtype
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.parallel.names import MESH_AXES
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training import cross_entropy


class LossSettings(NamedTuple):
    """What is minimised, and how it is computed.

    Attributes:
        chunk_size: tokens of a batch whose logits exist at once; None for all.
        z_loss: weight of the squared logarithm of the softmax's denominator.
    """

    chunk_size: int | None = None
    z_loss: float = 0.0


PLAIN = LossSettings()


class Losses(NamedTuple):
    """Sums over the counted positions of a batch, float32, and answers.

    Attributes:
        objective: what is minimised; gradients are taken of it alone.
        cross_entropy: in nats.
        z: the z-loss's part of the objective.
        correct: [B, T] bool, whether the likeliest token is the answer, the smallest id of several;
            of counted positions.
    """

    objective: jax.Array
    cross_entropy: jax.Array
    z: jax.Array
    correct: jax.Array


def losses_of(
    model: nnx.Module,
    batch: Batch,
    settings: LossSettings = PLAIN,
    layout: Layout | None = None,
) -> Losses:
    """The losses of ``model`` on ``batch``.

    Args:
        model: tokens [B, T] to logits [B, T, V]; for chunks with ``features`` and ``head`` as
            `SequenceModel` has them.
        batch: what is read and wanted.
        settings: see there.
        layout: of a mesh that the batch lies over.
    """
    packed = {} if batch.segment_ids is None else {"segment_ids": batch.segment_ids}
    if settings.chunk_size is None:
        is_whole = layout is None or layout.is_one
        if is_whole and isinstance(model, SequenceModel) and not _is_laid_out(model):
            found = _without_logits(model, batch, packed)
            if found is None:
                logits, reached = model.unspoilt(batch.inputs, **packed)
                found = cross_entropy.of_tokens(logits, batch.targets, batch.mask, reached)
            of_batch = _of_found(found, batch.mask, settings)
        else:
            logits = model(batch.inputs, **packed)
            of_batch = _of_logits(logits, batch.targets, batch.mask, settings)
    else:
        x_BTD = model.features(batch.inputs, **packed)
        of_batch = _in_chunks(model.head, x_BTD, batch, settings, layout)
    objective, *others = of_batch
    return Losses(objective, *map(jax.lax.stop_gradient, others))


def _is_laid_out(model: nnx.Module) -> bool:
    return any(any(explicit_names(x)) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _without_logits(
    model: SequenceModel, batch: Batch, packed: dict[str, jax.Array]
) -> cross_entropy.OfTokens | None:
    """What a GPU finds of few channels and ids without logits; None of others.

    And None of models that are not run by kernels: their losses have forward mode.
    """
    config = model.config
    kind = config.jax_dtypes["dtype"]
    x_BTD = jax.ShapeDtypeStruct((*batch.inputs.shape, config.hidden_size), kind)
    of_tokens = batch.targets, batch.mask
    is_taken = rows.takes_head(x_BTD, config.vocab_size, batch.inputs, *of_tokens)
    if not (is_taken and model.runs_kernel(x_BTD)):
        return None
    x_BTD, reached = model.before_head(batch.inputs, **packed)
    norm = model.norm
    arrays = x_BTD, norm.scale[...], model.head_kernel, *of_tokens
    return cross_entropy.of_sums(rows.head_sums(*arrays, norm.eps), batch.mask, reached)


def _of_logits(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, settings: LossSettings
) -> Losses:
    return _of_found(cross_entropy.of_tokens(logits, targets, mask), mask, settings)


def _of_found(found: cross_entropy.OfTokens, mask: jax.Array, settings: LossSettings) -> Losses:
    summed = jnp.sum(found.cross_entropy, where=mask)
    if not settings.z_loss:
        return Losses(summed, summed, jnp.zeros_like(summed), found.correct)
    z = settings.z_loss * jnp.sum(jnp.square(found.log_sum), where=mask)
    return Losses(summed + z, summed, z, found.correct)


def _in_chunks(
    head: nnx.Module, x_BTD: jax.Array, batch: Batch, settings: LossSettings, layout: Layout | None
) -> Losses:
    """As `_of_logits`, of chunks one after another; each device has a part of every chunk."""
    B, T, _ = x_BTD.shape
    X, Y = (1, 1) if layout is None else (layout.devices_of(name) for name in ("batch", "sequence"))
    X = X if B % X == 0 else 1  # a batch that no mesh cuts
    per_row = max(1, settings.chunk_size // B) * Y
    N = -(-T // per_row)
    filled = -T % (N * Y)

    def cut(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, 0), (0, filled)] + [(0, 0)] * (a.ndim - 2))
        a = a.reshape(X, B // X, Y, N, -1, *a.shape[2:])
        a = jnp.moveaxis(a, (3, 2), (0, 2))  # [N, X, Y, b, C, ...]
        if layout is None or layout.is_one:
            return a
        spec = PartitionSpec(None, MESH_AXES["batch"] if X > 1 else None, MESH_AXES["sequence"])
        return jax.lax.with_sharding_constraint(a, NamedSharding(layout.mesh, spec))

    # What does not count is 0, or a NaN there would reach the head's gradient by 0 times it.
    x_BTD = jnp.where(batch.mask[..., None], x_BTD, 0)
    graphdef, params = nnx.split(head)
    arrays = tuple(map(cut, (x_BTD, batch.targets, batch.mask)))
    losses = _chunks(graphdef, settings, params, *arrays)
    correct_BT = jnp.moveaxis(losses.correct, (0, 2), (3, 2)).reshape(B, T + filled)
    return losses._replace(correct=correct_BT[:, :T])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunks(graphdef, settings, params, x, targets, mask) -> Losses:
    """The losses of chunks [N, X, Y, b, C, ...]; ``correct`` has their shape."""

    def of_chunk(sums, chunk):
        losses = _of_chunk(graphdef, settings, params, *chunk)
        return jax.tree.map(jnp.add, sums, losses[:3]), losses.correct

    zeros = (jnp.zeros((), jnp.float32),) * 3
    sums, correct = jax.lax.scan(of_chunk, zeros, (x, targets, mask))
    return Losses(*sums, correct)


def _of_chunk(graphdef, settings, params, x, targets, mask) -> Losses:
    logits = _logits(nnx.merge(graphdef, params), x)
    return _of_logits(logits, targets, mask, settings)


def _logits(head: nnx.Module, x: jax.Array) -> jax.Array:
    return head.attend(x) if isinstance(head, nnx.Embed) else head(x)


def _chunks_forward(graphdef, settings, params, x, targets, mask):
    X, Y = x.shape[1:3]

    def objective(params, x, targets, mask):
        losses = _of_chunk(graphdef, settings, params, x, targets, mask)
        return losses.objective, losses

    # A sum of the head's gradient for every group: it stays on its device until all chunks are
    # done, where one for all would be added up over the mesh after every chunk.
    gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
    gradient = jax.vmap(jax.vmap(gradient, (None, 0, 0, 0)), (None, 0, 0, 0))

    def of_chunk(carry, chunk):
        sums, dparams = carry
        (of_params, dx), losses = gradient(params, *chunk)
        sums = jax.tree.map(lambda a, b: a + jnp.sum(b), sums, losses[:3])
        dparams = jax.tree.map(lambda a, b: a + b.astype(a.dtype), dparams, of_params)
        return (sums, dparams), (losses.correct, dx)

    wide = lambda a: accumulator_dtype(a.dtype)
    zeros = jax.tree.map(lambda a: jnp.zeros((X, Y, *a.shape), wide(a)), params)
    carry = (jnp.zeros((), jnp.float32),) * 3, zeros
    (sums, dparams), (correct, dx) = jax.lax.scan(of_chunk, carry, (x, targets, mask))
    dparams = jax.tree.map(lambda a: jnp.sum(a, axis=(0, 1)), dparams)
    dtypes = jax.tree.map(lambda a: jnp.zeros(0, a.dtype), params)
    return Losses(*sums, correct), (dparams, dx, dtypes)


def _chunks_backward(graphdef, settings, residuals, cotangents):
    dparams, dx, dtypes = residuals

    def scaled(a, like):
        wide = accumulator_dtype(a.dtype)
        return (cotangents.objective.astype(wide) * a.astype(wide)).astype(like.dtype)

    return jax.tree.map(scaled, dparams, dtypes), scaled(dx, dx), None, None


_chunks.defvjp(_chunks_forward, _chunks_backward)
