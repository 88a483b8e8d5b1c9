"""The blocks of a model, run one after another or as a scan, and what is computed anew backwards.

Traced one by one, blocks make a program that grows with their number, and compiling grows with it.
In a scan only those are traced that differ: one, or the few after which a hybrid repeats itself.
Their parameters are stacked inside the program, so that a model and its checkpoints are the same
either way; the stack is a copy of the parameters while the program runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deltaproduct_jax.layers import softmax
from deltaproduct_jax.models.config import ModelConfig
from deltaproduct_jax.ops import RESIDUAL_NAMES, containment
from deltaproduct_jax.ops.blocks import rows
from deltaproduct_jax.ops.convolution import dispatch as convolution
from deltaproduct_jax.ops.parts import placement

MixerState = Any  # of the class that the mixer is registered with
Run = Callable[..., tuple[jax.Array, MixerState]]

# All but matrix products, the op's own results and convolutions by a kernel is cheap to compute
# anew from them, and most of what a block would keep: norms, activations. One number or flag for a
# row of channels is no memory, and spares another pass over the row. What q, k and v are made of is
# kept where one product reads it, and the block's middle in the place of its mixer's product.
_policies = jax.checkpoint_policies
_KEPT = {
    "products": lambda config: _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(
            *RESIDUAL_NAMES[1:],
            *(convolution.POINT, convolution.READ_POINT, containment.POINT, rows.MIDDLE),
            *(rows.NORM_POINT, rows.HIDDEN_POINT, softmax.POINT),
        ),
    ),
    "blocks": lambda config: _policies.nothing_saveable,
    "named": lambda config: _policies.save_only_these_names(*config.saved_points),
}


def run_blocks(
    config: ModelConfig,
    blocks: Sequence[nnx.Module],
    x: jax.Array,
    before: Sequence[MixerState | None],
    *,
    segment_ids: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, list[MixerState]]:
    """Whole sequences through all blocks.

    Args:
        config: of the model.
        blocks: its blocks.
        x: [B, T, D].
        before: the state of each block before the first token, or None.
        segment_ids: [B, T] or None, as the model has it.
        mask: [B, T] or None, as the model has it.

    Returns:
        Outputs [B, T, D], and the state of each block after the last token.
    """
    read = {"segment_ids": segment_ids, "mask": mask}
    passed_on = blocks[0].for_later_blocks(x, state=before[0], **read)
    run, given = _runner(config), given_to_blocks(config, passed_on)
    if config.remat == "products" and placement() is None:
        blocks = [with_rounded_kernels(block) for block in blocks]
    kinds = [(config.mixer_of(i).kind_of(i), given[i] is None) for i in range(len(blocks))]
    period = repetition(kinds) if config.scan_layers else None
    after: list[MixerState] = []
    at = 0
    while at < len(blocks):
        if period is not None and at == period[0]:
            start, length, times = period
            span = slice(start, start + length * times)
            x, states = _scanned(run, blocks[span], x, before[span], length, given[span], read)
            at = span.stop
        else:
            x, entry = run(blocks[at], x, before[at], **read, passed_on=given[at])
            states, at = [entry], at + 1
        after += states
    return x, after


def with_rounded_kernels(block: nnx.Module) -> nnx.Module:
    """The block with the kernels of its linear maps in the dtype that these compute in.

    Rounded, and joined where one product takes several, in front of a block that is computed anew,
    they are so once.
    """
    block = nnx.merge(*nnx.split(block))
    for _, module in nnx.iter_modules(block):
        if isinstance(module, nnx.Linear):
            kernel = module.kernel[...]
            module.kernel = nnx.Param(kernel.astype(module.dtype or kernel.dtype))
    for _, module in nnx.iter_modules(block):
        if joined := getattr(module, "joined_kernels", dict)():
            module.joined = nnx.data({name: nnx.Param(x) for name, x in joined.items()})
    return block


def given_to_blocks(
    config: ModelConfig, passed_on: Mapping[str, Any]
) -> list[Mapping[str, Any] | None]:
    """What each block's mixer gets of the first block's: those of the same kind, but the first."""
    first = config.mixer_of(0)
    takes = [i and config.mixer_of(i) is first for i in range(config.num_layers)]
    return [passed_on if passed_on and of_block else None for of_block in takes]


def repetition(kinds: Sequence[Any]) -> tuple[int, int, int] | None:
    """Where a list repeats itself: (start, length, times) that leave the fewest items in all.

    None where nothing follows itself; what stands before and behind is left as it is.
    """
    size, best = len(kinds), (len(kinds), None)
    for length in range(1, size // 2 + 1):
        for start in range(min(length, size - 2 * length) + 1):
            times = 1
            part = kinds[start : start + length]
            while kinds[start + times * length : start + (times + 1) * length] == part:
                times += 1
            left = size - (times - 1) * length
            if times > 1 and left < best[0]:
                best = left, (start, length, times)
    return best[1]


def _scanned(
    run: Run,
    blocks: Sequence[nnx.Module],
    x: jax.Array,
    before: Sequence[MixerState | None],
    length: int,
    given: Sequence[Mapping[str, Any] | None],
    read: Mapping[str, Any],
) -> tuple[jax.Array, list[MixerState]]:
    """Blocks that repeat themselves after ``length``, traced that often."""
    graphdefs = [nnx.split(block)[0] for block in blocks[:length]]
    params = [nnx.to_pure_dict(nnx.split(block)[1]) for block in blocks]
    arrays = [
        (_stacked(params[place::length]), _stacked(before[place::length]))
        for place in range(length)
    ]

    def some(x: jax.Array, arrays: Any) -> tuple[jax.Array, list[MixerState]]:
        after = []
        for graphdef, (params, state), passed_on in zip(graphdefs, arrays, given, strict=False):
            block = nnx.merge(graphdef, params)
            x, entry = run(block, x, state, **read, passed_on=passed_on)
            after.append(entry)
        return x, after

    x, after = jax.lax.scan(some, x, arrays)
    times = len(blocks) // length
    return x, [
        jax.tree.map(lambda a, i=i: a[i], of_place) for i in range(times) for of_place in after
    ]


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _runner(config: ModelConfig) -> Run:
    """Calls a block on whole sequences, and computes anew for its gradient what is not kept."""
    fused = config.remat != "named"

    def run(
        block: nnx.Module,
        x: jax.Array,
        state: MixerState | None,
        segment_ids: jax.Array | None,
        mask: jax.Array | None,
        passed_on: Mapping[str, Any] | None,
    ) -> tuple[jax.Array, MixerState]:
        read = {"state": state, "segment_ids": segment_ids, "mask": mask, "passed_on": passed_on}
        spread = placement()
        if spread is None:
            return block(x, **read, fused=fused)
        graphdef, params = nnx.split(block)

        def whole(params: Any, x: jax.Array, read: Any) -> tuple[jax.Array, MixerState]:
            return nnx.merge(graphdef, params)(x, **read, fused=fused)

        return spread.block(whole, nnx.to_pure_dict(params), x, read)

    if config.remat not in _KEPT:
        return run
    return nnx.remat(run, policy=_KEPT[config.remat](config))
