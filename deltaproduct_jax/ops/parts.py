"""Functions of arrays that lie over explicit axes of a mesh, run on each device's part of them.

Sequences and heads share nothing, so a function of them runs on every device's own ones: inside
`jax.shard_map`, where what it makes, zeros and carries of scans, is of the size of a part. Axes of
the other two kinds need nothing of this: Auto ones are the compiler's, Manual ones are cut already.

Layers and models know nothing of meshes with Auto axes. Whoever trains over one says by `placed`,
for the time of a trace, how the op is spread over it and what a block does to its parameters.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# The dimensions that may be cut, and what is cut with them.
_ROLES = {"B": "batch", "H": "heads", "Hv": "heads"}


def on_each_part(
    run: Callable[[dict[str, jax.Array]], Any],
    arrays: Mapping[str, jax.Array | None],
    layouts: Mapping[str, tuple[str, ...]],
    out_layouts: Any,
    *,
    check_vma: bool = True,
    all_axes: bool = False,
) -> Any:
    """``run(arrays)``, over the explicit mesh axes along which batch and heads of the arrays lie.

    An array that does not lie along an axis where others do is cut alike, which moves nothing.
    Inside no axis of the mesh is explicit, so that all that JAX has can be done there.

    Args:
      run: takes the arrays by name, those that are None among them.
      arrays: by name.
      layouts: dimensions of every array, by name; "B" is the batch, "H" and "Hv" are heads.
      out_layouts: the same for every result, in the structure of the results.
      check_vma: of `jax.shard_map`.
      all_axes: also where nothing lies along any of them.

    Raises:
      ValueError: an array lies over an axis along another dimension, or along two.
    """
    given = {name: x for name, x in arrays.items() if x is not None}
    axes = _axes_of_roles(given, layouts)
    manual = set().union(*(_axes_of(mesh_of(x), AxisType.Explicit) for x in given.values()))
    if not manual or not (axes or all_axes):
        return run(dict(arrays))
    mesh = next(m for m in map(mesh_of, given.values()) if not m.empty)
    specs = {name: _spec(layouts[name], axes) for name in given}
    cut = {name: _cut(x, mesh, specs[name]) for name, x in given.items()}
    return jax.shard_map(
        lambda cut: run({name: cut.get(name) for name in arrays}),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=jax.tree.map(lambda x: _spec(x, axes), out_layouts, is_leaf=_is_layout),
        axis_names=frozenset(manual),
        check_vma=check_vma,
    )(cut)


def is_left_to_the_compiler(*, but_explicit: bool = False) -> bool:
    """Whether the mesh around what is traced has an axis of several devices that is not manual.

    Nor explicit, where whoever asks runs `on_each_part` along all of these.
    """
    mesh = jax.sharding.get_abstract_mesh()
    of_several = bool(_axes_of(mesh, AxisType.Auto, least=2))
    return of_several or (not but_explicit and bool(explicit_axes(mesh)))


def explicit_axes(mesh: AbstractMesh | Mesh) -> set[str]:
    """The explicit axes of several devices of a mesh."""
    return _axes_of(mesh, AxisType.Explicit, least=2)


def _axes_of(mesh: AbstractMesh | Mesh, kind: AxisType, least: int = 1) -> set[str]:
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name for name, size, type_ in axes if size >= least and type_ == kind}


def along_rows_of(like: jax.Array, tree: Any) -> Any:
    """Arrays [B, ...], over the explicit axes along which the batch of ``like`` lies."""
    names = explicit_names(like)[0]
    if not names:
        return tree
    spec = PartitionSpec(names)
    return jax.tree.map(lambda x: _cut(x, mesh_of(like), spec), tree)


def cut_by_rows(x: Any) -> Any:
    """``x`` [B, ...], not along axes of one device but by rows: they cut nothing; others as given.

    JAX refuses sums and more along them all the same.
    """
    if not isinstance(x, jax.Array) or explicit_names(x)[1:] == explicit_names(x, least=2)[1:]:
        return x
    return _cut(x, mesh_of(x), PartitionSpec(explicit_names(x)[0] or None))


def on_each_row(run: Callable[..., Any], *trees: Any) -> Any:
    """``run(*trees)``, arrays [B, ...] to arrays [B, ...], whose rows share nothing.

    For gathers along a row, which JAX refuses where rows lie over explicit axes.
    """
    lies = [x for x in jax.tree.leaves(trees) if explicit_names(x)[0]]
    if not lies:
        return run(*trees)
    mesh, spec = mesh_of(lies[0]), PartitionSpec(explicit_names(lies[0])[0])
    manual = frozenset(_axes_of(mesh, AxisType.Explicit))
    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=manual)(
        *along_rows_of(lies[0], trees)
    )


def gathered_along(index: jax.Array) -> NamedSharding | None:
    """How ``table[index]``, rows of a table that is whole, lies: as the index; None: no matter."""
    names = _names_by_role(index, ("B", *("T" for _ in index.shape[1:])))
    if not any(explicit_names(index)):
        return None
    return NamedSharding(mesh_of(index), PartitionSpec(*(n or None for n in names), None))


def _is_layout(x: Any) -> bool:
    return type(x) is tuple and all(isinstance(d, str) for d in x)


def mesh_of(x: jax.Array):
    """The mesh of an array; outside jit with its devices, without which nothing could be moved."""
    abstract = jax.typeof(x).sharding.mesh
    return abstract if isinstance(x, jax.core.Tracer) or abstract.empty else x.sharding.mesh


def explicit_names(x: jax.Array, least: int = 1) -> list[tuple[str, ...]]:
    """Per dimension the explicit mesh axes, of so many devices at least, along which ``x`` lies."""
    sharding = jax.typeof(x).sharding
    types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    spec = [(entry,) if isinstance(entry, str) else entry or () for entry in sharding.spec]
    spec += [()] * (x.ndim - len(spec))
    size = sharding.mesh.shape
    kept = lambda name: types[name] == AxisType.Explicit and size[name] >= least
    return [tuple(filter(kept, names)) for names in spec]


def _axes_of_roles(arrays, layouts) -> dict[str, tuple[str, ...]]:
    """The axes of batch and heads, if any; ValueError where an array lies otherwise."""
    axes: dict[str, tuple[str, ...]] = {}
    for name, x in arrays.items():
        for dimension, names in zip(layouts[name], _names_by_role(x, layouts[name]), strict=True):
            if not names:
                continue
            role, text = _ROLES.get(dimension), "/".join(names)
            if dimension == "T":
                raise ValueError(
                    f"{name} lies over the mesh axis {text!r} along T; here rows are whole, and "
                    f"sharded_delta_product(..., sequence_axis={text!r}) cuts them"
                )
            if role is None:
                raise ValueError(
                    f"{name} lies over the mesh axis {text!r} along {dimension}; it may lie over "
                    "an axis along B and heads, and jax.sharding.reshard lays it out so"
                )
            if axes.setdefault(role, names) != names or _shared(axes):
                raise ValueError(
                    f"{name} lies over the mesh axis {text!r} along {dimension}, where others lie "
                    f"over {axes}; all arrays must agree, as jax.sharding.reshard makes them"
                )
    for name, x in arrays.items():
        for dimension, size in zip(layouts[name], x.shape, strict=True):
            names = axes.get(_ROLES.get(dimension, ""), ())
            devices = math.prod(_size(arrays, axis) for axis in names)
            if names and size % devices:
                raise ValueError(
                    f"{name} has {dimension}={size}, which must be a multiple of the {devices} "
                    f"devices of the mesh axis {'/'.join(names)!r} over which others lie"
                )
    return axes


def _names_by_role(x: jax.Array, layout: Sequence[str]) -> list[tuple[str, ...]]:
    """`explicit_names`, but along other dimensions than batch and heads none of one device.

    They cut nothing there, and so nothing is refused.
    """
    named = zip(layout, explicit_names(x), explicit_names(x, least=2), strict=True)
    return [names if dimension in _ROLES else cut for dimension, names, cut in named]


def _shared(axes: dict[str, tuple[str, ...]]) -> bool:
    names = [name for role in axes.values() for name in role]
    return len(names) > len(set(names))


def _size(arrays, axis: str) -> int:
    return next(mesh_of(x).shape[axis] for x in arrays.values() if axis in mesh_of(x).axis_names)


def _spec(layout: tuple[str, ...], axes: dict[str, tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(axes.get(_ROLES.get(d, "")) or None for d in layout))


def _cut(x: jax.Array, mesh, spec: PartitionSpec) -> jax.Array:
    """``x`` laid out as ``spec`` says, and along other dimensions as it is."""
    names = [*spec] + [None] * (x.ndim - len(spec))
    kept = [old or None for old in explicit_names(x, least=2)]
    whole = PartitionSpec(*(new or old for new, old in zip(names, kept, strict=True)))
    return jax.sharding.reshard(x, NamedSharding(mesh, whole))


class OwnHeads(NamedTuple):
    """What a device of a mesh has of arrays [B, T, H, ...], if rows are to be whole.

    Attributes:
      B: rows of a device.
      H: heads of a device; where all of them do not divide, some are zeros.
      run: (compute, tokens, places) -> ``compute(tokens, places)``, run by every device on whole
        rows of its own heads. ``tokens`` and the result are arrays [B, T, H, ...], ``places`` a
        tree of arrays [B, T]; rows and heads share nothing.
    """

    B: int
    H: int
    run: Callable[[Callable[[Any, Any], jax.Array], Any, Any], jax.Array]


# (run, layouts, out_layouts, *arrays) -> ``run(*arrays)``, run by every device on its own tokens;
# never differentiated. A layout is a letter for each axis: along B, T and F, the width of an MLP,
# arrays are cut, along all others whole. Results without B are sums over tokens, or None.
OnTokens = Callable[..., tuple[jax.Array | None, ...]]


class Placement(NamedTuple):
    """How a model that is being traced lies on a mesh.

    Attributes:
      op: what `delta_product` calls instead of itself, with its own arguments.
      block: (run, params, x, others) -> ``run(params, x, others)`` of a block of a model, with its
        parameters whole. Where rows alone are cut, on every device's own ones, as if it had no
        others. Besides parameters all are trees of arrays [B, ...], what is returned too.
      heads: a kernel [D, parts, width], width that of all heads -> the same, cut as they are.
      past: what `with_past` calls instead of itself.
      head_devices: over how many devices heads are cut.
      own_heads: (B, T, H) of arrays [B, T, H, ...] -> what a device has of them, None where the
        mesh does not divide these sizes, and the compiler cuts what is run.
      own_tokens: (B, T, F) -> what runs kernels that read every token on its own, None alike.
    """

    op: Callable[..., tuple[Any, Any]]
    block: Callable[[Callable[..., Any], Any, jax.Array, Any], Any]
    heads: Callable[[jax.Array], jax.Array]
    past: Callable[..., jax.Array]
    head_devices: int
    own_heads: Callable[[int, int, int], OwnHeads | None]
    own_tokens: Callable[[int, int, int], OnTokens | None]


_CURRENT: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement")


def placement() -> Placement | None:
    """The placement of what is being traced, None on one device and within one device's piece."""
    return _CURRENT.get(None)


@contextlib.contextmanager
def placed(placement: Placement | None) -> Iterator[None]:
    """Inside, what is traced lies as ``placement`` says.

    It is to be entered inside the function that `jax.jit` traces: a program found again does not
    look here.
    """
    token = _CURRENT.set(placement)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def with_past(
    compute: Callable[..., jax.Array],
    arrays: Any,
    before: Any,
    *others: Any,
    on_each_device: bool = False,
    check_vma: bool = True,
    ranks: Sequence[int] | None = None,
) -> Any:
    """``compute(arrays, before, *others)``, where a token depends on as many before it.

    Over a mesh that cuts tokens, every device does so for its own, and is sent no more than what
    stands before them.

    Args:
      compute: takes arrays [B, T, ...], any T, and [B, tail, ...], and gives one like the first.
      arrays: a tree of arrays [B, T] or [B, T, ..., channels].
      before: the same of arrays [B, tail, ...]; with fewer channels of the first of them.
      others: arrays [..., channels], the same for all tokens.
      on_each_device: ``compute`` runs a kernel, so that over a mesh nothing is left to the
        compiler: batch and channels are cut as batch and heads of the op are.
      check_vma: of `jax.shard_map`.
      ranks: of the arrays [B, T, ..., channels] that ``compute`` gives, a tuple; None: it gives one
        like the first.
    """
    spread = placement()
    if spread is None:
        return compute(arrays, before, *others)
    how = {"on_each_device": on_each_device, "check_vma": check_vma, "ranks": ranks}
    return spread.past(compute, arrays, before, *others, **how)


def side_by_side(arrays: Sequence[jax.Array], devices: int) -> jax.Array:
    """Arrays [..., parts, width], of heads along ``width``, as one [..., devices * own].

    What a device has of all of them lies together, one array behind another and each in its parts,
    so that one product makes it, and a device's kernels read it where it lies.
    """
    own = [x.reshape(*x.shape[:-1], devices, -1) for x in arrays]
    own = [jnp.moveaxis(x, -2, -3) for x in own]
    own = [x.reshape(*x.shape[:-2], -1) for x in own]
    joined = jnp.concatenate(own, axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


def taken_apart(x: jax.Array, sizes: Sequence[tuple[int, int]], devices: int) -> list[jax.Array]:
    """What `side_by_side` was given, of (parts, width) each, as [..., parts * width]."""
    own = x.reshape(*x.shape[:-1], devices, -1)
    found, at = [], 0
    for parts, width in sizes:
        of_array = own[..., at : at + parts * width // devices]
        of_array = of_array.reshape(*of_array.shape[:-1], parts, -1)
        of_array = jnp.moveaxis(of_array, -3, -2)
        found.append(of_array.reshape(*x.shape[:-1], parts * width))
        at += parts * width // devices
    return found
