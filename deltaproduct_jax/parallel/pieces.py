"""Layers' own functions of tokens and heads, run by every device of a mesh on its piece of them.

Shape suffixes: B batch, T tokens, H heads.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltaproduct_jax.ops.parts import OnTokens, OwnHeads
from deltaproduct_jax.parallel.names import MESH_AXES


def own_heads(mesh: Mesh, B: int, T: int, H: int) -> OwnHeads | None:
    """`ops.parts.Placement.own_heads` over a mesh.

    Along the sequence devices exchange heads for tokens and back, each way an array of the size of
    a device's piece (Jacobs et al., "DeepSpeed Ulysses", 2023). So all have as much to do, which
    causal attention of pieces to all that stands before them would not give.
    """
    rows, pieces, parts = (_devices(mesh, MESH_AXES[n]) for n in ("batch", "sequence", "heads"))
    if B % rows or T % pieces or H % parts:
        return None
    own = -(-H // (parts * pieces))
    return OwnHeads(B // rows, own, functools.partial(_on_own_heads, mesh, own * pieces))


def _on_own_heads(
    mesh: Mesh,
    filled: int,
    compute: Callable[[Any, Any], jax.Array],
    tokens: Any,
    places: Any,
) -> jax.Array:
    """``filled`` heads, as many of them zeros as there are fewer on the devices of a sequence."""
    batch, (sequence,), (heads,) = (MESH_AXES[name] for name in ("batch", "sequence", "heads"))
    exchange = functools.partial(jax.lax.all_to_all, axis_name=sequence, tiled=True)

    def on_device(tokens: Any, places: Any) -> jax.Array:
        if mesh.shape[sequence] == 1:
            return compute(tokens, places)

        def whole(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, [(0, 0), (0, 0), (0, filled - x.shape[2]), *[(0, 0)] * (x.ndim - 3)])
            return exchange(x, split_axis=2, concat_axis=1)

        count = jax.tree.leaves(tokens)[0].shape[2]
        gather = functools.partial(jax.lax.all_gather, axis_name=sequence, axis=1, tiled=True)
        o = compute(jax.tree.map(whole, tokens), jax.tree.map(gather, places))
        return exchange(o, split_axis=1, concat_axis=2)[:, :, :count]

    of_places = PartitionSpec(batch, sequence)
    of_tokens = PartitionSpec(batch, sequence, heads)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(of_tokens, of_places), out_specs=of_tokens
    )(tokens, places)


def own_tokens(mesh: Mesh, B: int, T: int, F: int) -> OnTokens | None:
    """`ops.parts.Placement.own_tokens` over a mesh."""
    sizes = {"batch": B, "sequence": T, "mlp": F}
    if any(n % _devices(mesh, MESH_AXES[name]) for name, n in sizes.items()):
        return None
    return functools.partial(_on_own_tokens, mesh)


def _on_own_tokens(
    mesh: Mesh,
    run: Callable[..., tuple[jax.Array | None, ...]],
    layouts: Sequence[str],
    out_layouts: Sequence[str],
    *arrays: jax.Array,
) -> tuple[jax.Array | None, ...]:
    axes = {"B": MESH_AXES["batch"], "T": MESH_AXES["sequence"], "F": MESH_AXES["mlp"]}
    cutting_tokens = tuple(axis for axis in axes["B"] + axes["T"] if mesh.shape[axis] > 1)
    spec = lambda layout: PartitionSpec(*(axes.get(letter) for letter in layout))

    def on_device(*arrays: jax.Array) -> tuple[jax.Array | None, ...]:
        found = zip(run(*arrays), out_layouts, strict=True)
        return tuple(
            x if x is None or "B" in layout else jax.lax.psum(x, cutting_tokens)
            for x, layout in found
        )

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=tuple(map(spec, layouts)),
        out_specs=tuple(map(spec, out_layouts)),
        check_vma=False,  # no cotangent passes
    )(*arrays)


def _devices(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def with_past(
    mesh: Mesh,
    compute: Callable[..., jax.Array],
    arrays: Any,
    before: Any,
    *others: jax.Array,
    on_each_device: bool,
    check_vma: bool,
    ranks: Sequence[int] | None,
) -> Any:
    """`ops.parts.with_past` over a mesh: a device is sent the end of the piece before its own."""
    axis = "sequence"
    pieces = mesh.shape[axis]
    tokens = {x.shape[1] for x in jax.tree.leaves(arrays)}
    tail = max(x.shape[1] for x in jax.tree.leaves(before))
    # Of shorter pieces it would reach two back.
    is_cut = pieces > 1 and all(T % pieces == 0 and T // pieces >= tail for T in tokens)
    if not is_cut and not on_each_device:
        return compute(arrays, before, *others)

    def past_of(x: jax.Array, before: jax.Array) -> jax.Array:
        ends = x[:, x.shape[1] - before.shape[1] :]
        ends = ends if ends.shape == before.shape else ends[..., : before.shape[-1]]
        past = jax.lax.ppermute(ends, axis, [(i, i + 1) for i in range(pieces - 1)])
        return jnp.where(jax.lax.axis_index(axis) == 0, before, past)

    def on_piece(arrays, before, *others):
        before = jax.tree.map(past_of, arrays, before) if is_cut else before
        return compute(arrays, before, *others)

    # What has no axis here is left to the compiler.
    batch, heads = (MESH_AXES[n] if on_each_device else None for n in ("batch", "heads"))
    first = jax.tree.leaves(arrays)[0]
    if batch and first.shape[0] % _devices(mesh, batch):
        batch = None

    def of_rank(rank: int, along: str | None) -> PartitionSpec:
        return PartitionSpec(*[batch, along, *[None] * (rank - 3), heads][:rank])

    def specs(tree: Any, along: str | None) -> Any:
        return jax.tree.map(lambda x: of_rank(x.ndim, along), tree)

    if on_each_device:  # of parts side by side a device has other columns than are stored there
        whole = NamedSharding(mesh, PartitionSpec())
        others = [jax.lax.with_sharding_constraint(x, whole) if x.ndim > 2 else x for x in others]
    of_tokens = axis if is_cut else None
    of_results = tuple(of_rank(rank, of_tokens) for rank in ranks or (first.ndim,))
    of_others = [PartitionSpec(*[None] * (x.ndim - 1), heads) for x in others]
    return jax.shard_map(
        on_piece,
        mesh=mesh,
        in_specs=(specs(arrays, of_tokens), specs(before, None), *of_others),
        out_specs=of_results[0] if ranks is None else of_results,
        axis_names=frozenset(mesh.axis_names if on_each_device else {axis}),
        check_vma=check_vma,
    )(arrays, before, *others)
