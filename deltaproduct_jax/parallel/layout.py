"""Where the arrays of a run lie on its mesh, and how a model is traced for it.

Parameters and all that is kept for each of them (AdamW's moments) are cut over fsdp and tensor.
A block gathers its own over fsdp just before it runs, in the part that is rematerialised, so that
no more than a block's are whole at a time; their gradients are cut again as soon as they are there.
Where rows alone are cut, a block runs inside `jax.shard_map`, so that a device runs what it would
alone, every kernel among it. Where tokens or heads are, only what has kernels does (`pieces.py`),
and all else is left to the compiler.

Shape suffixes: B batch, T tokens, D model width.
"""

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.ops.parts import Placement, placed, placement
from deltaproduct_jax.ops.sharding import sharded_delta_product
from deltaproduct_jax.parallel import pieces
from deltaproduct_jax.parallel.config import AXES, GROUPS, DeviceConfig
from deltaproduct_jax.parallel.names import MESH_AXES, Names, Path, cut, names_of_model

BLOCKS = "layers"  # of a model: the list of what gathers its own parameters


def all_devices() -> list[jax.Device]:
    """The devices of all processes of the run."""
    return jax.devices()


def make_mesh(config: DeviceConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of the run, or over the first that suffice in a single process.

    Args:
        config: how many lie along each axis.
        devices: of the run; None is all that JAX finds.

    Raises:
        ConfigError: there are not as many devices as it takes.
    """
    devices = all_devices() if devices is None else devices
    if config.dcn_mesh is not None:
        return _mesh_of(_hybrid_grid(config, devices))
    sizes = config.sizes_of(len(devices))
    shape = tuple(sizes[name] for name in AXES)
    count = math.prod(shape)
    if count < len(devices):
        if jax.process_count() > 1:
            raise ConfigError(
                f"mesh={config.mesh!r} takes {count} of {len(devices)} devices; with several "
                "processes it must take all"
            )
        # A part of a torus of TPUs is none, and JAX has no order for it.
        return _mesh_of(np.asarray(devices[:count], object).reshape(shape))
    return _mesh_of(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True))


def _mesh_of(grid: np.ndarray) -> Mesh:
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _hybrid_grid(config: DeviceConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices along the axes: within a slice, or a process, as mesh says, those as dcn_mesh does.

    Along an axis that both cut, the devices of one group are neighbours.
    """
    slices = {getattr(device, "slice_index", None) for device in devices}
    by_process = len(slices) == 1
    group_of = "process_index" if by_process else "slice_index"
    counts = collections.Counter(getattr(device, group_of) for device in devices)
    outer = config.dcn_sizes_of(len(counts))
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"dcn_mesh={config.dcn_mesh!r} needs as many devices in each of the {GROUPS}; there "
            f"are {', '.join(map(str, counts.values()))}"
        )
    each = len(devices) // len(counts)
    inner = config.sizes_of(each)
    if math.prod(inner.values()) < each:
        raise ConfigError(
            f"mesh={config.mesh!r} takes {math.prod(inner.values())} of {each} devices; with "
            "dcn_mesh it must take all of each group"
        )
    return mesh_utils.create_hybrid_device_mesh(
        tuple(inner[name] for name in AXES),
        tuple(outer[name] for name in AXES),
        devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


class Layout:
    """A mesh and what lies where on it. Over one device it changes nothing at all.

    Args:
        mesh: with the axes of `AXES`.
        names: logical names of the model's parameters by path, see `names_of_model`.
    """

    def __init__(self, mesh: Mesh, names: Mapping[Path, Names | None]):
        self.mesh = mesh
        self.sizes = dict(mesh.shape)
        self.is_one = mesh.size == 1
        self._names = names

    @classmethod
    def of_model(
        cls,
        config: DeviceConfig,
        make_model: Callable[[], nnx.Module],
        devices: Sequence[jax.Device] | None = None,
    ) -> "Layout":
        """The layout of a model that is described but not made; `make_mesh` has ``devices``."""
        return cls(make_mesh(config, devices), names_of_model(nnx.eval_shape(make_model)))

    @property
    def device_kind(self) -> str:
        """JAX's name of the chips."""
        return self.mesh.devices.flat[0].device_kind

    def devices_of(self, name: str) -> int:
        """Devices over which a logical axis is cut."""
        return int(np.prod([self.sizes[axis] for axis in MESH_AXES[name]]))

    def require_divisible(self, name: str, **sizes: int | None) -> None:
        """Raises ConfigError unless the sizes, by the flags that set them, can be cut."""
        devices = self.devices_of(name)
        for flag, size in sizes.items():
            if size is not None and size % devices:
                cutting = [axis for axis in MESH_AXES[name] if self.sizes[axis] > 1]
                raise ConfigError(
                    f"{flag}={size} must be a multiple of the {devices} devices of mesh axis "
                    f"{' and '.join(cutting)}; give another mesh or {flag}"
                )

    def _sharding(self, *axes: str | tuple[str, ...] | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def whole(self) -> NamedSharding:
        """The same on every device."""
        return self._sharding()

    def _of_parameter(self, path: Path, shape: tuple[int, ...], *, fsdp: bool) -> NamedSharding:
        return self._sharding(*cut(self._names[path], shape, self.sizes, fsdp=fsdp))

    def shardings(self, tree: Any) -> Any:
        """Of a state of training, of its shapes, or of a part of it.

        What ends in a parameter's path and has a parameter's rank lies as that parameter does; all
        else is the same everywhere.
        """

        def of_leaf(keys: Any, leaf: Any) -> NamedSharding:
            path = self._parameter_of(keys)
            if path is None or not leaf.ndim:
                return self.whole
            return self._of_parameter(path, leaf.shape, fsdp=True)

        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    def _parameter_of(self, keys: Any) -> Path | None:
        path = _path_of(keys)
        ends = (path[start:] for start in range(len(path)))
        return next((end for end in ends if end in self._names), None)

    def pin(self, tree: Any) -> Any:
        """A tree as :meth:`shardings` has it, while a program is traced."""
        return tree if self.is_one else jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def everywhere(self, tree: Any) -> Any:
        """A tree with all of it on every device, while a program is traced."""
        return tree if self.is_one else jax.lax.with_sharding_constraint(tree, self.whole)

    def cut_batch(self, batch: Any, *, parts: bool = False) -> Any:
        """Arrays [B, T], or [A, B, T] in ``parts``, cut over the mesh while a program is traced.

        T is filled up at its end to what the sequence's axis divides: with zeros, and False in a
        mask, so that nothing of it counts.

        Raises:
            ConfigError: the mesh does not divide B. Of rows that the compiler fills up by itself
                the gradient of an embedding came out wrong.
        """
        if self.is_one:
            return batch
        *_, B, T = jax.tree.leaves(batch)[0].shape
        self.require_divisible("batch", B=B)
        filled = -T % self.sizes["sequence"]
        sharding = self._sharding(*[None] * parts, MESH_AXES["batch"], "sequence")

        def of_array(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, filled)])
            return jax.lax.with_sharding_constraint(x, sharding)

        return jax.tree.map(of_array, batch)

    def gather(self, params: Any) -> Any:
        """A model's parameters as they are used, but for the blocks', who gather their own."""
        if self.is_one:
            return params

        # An embedding's gradient is a scatter, which to be cut would first gather what it scatters.
        def of_leaf(keys: Any, x: jax.Array) -> jax.Array:
            return x if _path_of(keys)[0] == BLOCKS else self._gathered(keys, x, summed_whole=True)

        return jax.tree_util.tree_map_with_path(of_leaf, params)

    def _gathered(self, keys: Any, x: jax.Array, *, summed_whole: bool = False) -> jax.Array:
        path = self._parameter_of(keys)
        stored, used = (self._of_parameter(path, x.shape, fsdp=fsdp) for fsdp in (True, False))
        return _moved(x, used, (used, stored) if summed_whole else (stored,))

    def placed(self) -> Any:
        """A context in which a model is traced for this mesh."""
        if self.is_one:
            return placed(placement())
        op = functools.partial(
            sharded_delta_product,
            mesh=self.mesh,
            batch_axis=MESH_AXES["batch"],
            head_axis=MESH_AXES["heads"],
            sequence_axis=MESH_AXES["sequence"],
        )
        of_pieces = (pieces.with_past, pieces.own_heads, pieces.own_tokens)
        past, *own = (functools.partial(f, self.mesh) for f in of_pieces)
        devices = self.devices_of("heads")
        return placed(Placement(op, self._run_block, self._cut_heads, past, devices, *own))

    def _cut_heads(self, kernel: jax.Array) -> jax.Array:
        """A kernel ``[D, parts, width]`` cut along ``width``; its gradient goes the same way back.

        As it is stored, all parts along one axis, a device has other columns of it. Left to itself
        the compiler then moves activations, which are larger, or warns that it replicates.
        """
        (heads,), (embed,) = MESH_AXES["heads"], MESH_AXES["embed"]
        kernel = _moved(kernel, self.whole, (self._sharding(embed),))
        cut = self._sharding(None, None, heads)
        return _moved(kernel, cut, (self._sharding(embed, None, heads),))

    def _run_block(self, run: Callable[..., Any], params: Any, x: jax.Array, others: Any) -> Any:
        """A block as `ops.parts.Placement` has it."""
        prefix = self._prefix_of_block(params)
        if self._cuts_rows_alone(x, others):
            return self._on_rows(run, prefix, params, x, others)
        params = jax.tree_util.tree_map_with_path(
            lambda keys, p: self._gathered((*prefix, *keys), p), params
        )
        cut_BTD = self._sharding(MESH_AXES["batch"], "sequence", None)
        return run(params, jax.lax.with_sharding_constraint(x, cut_BTD), others)

    def _cuts_rows_alone(self, x: jax.Array, others: Any) -> bool:
        """Whether every device may have rows of its own, and all of them."""
        among_others = [n for axis, n in self.sizes.items() if axis not in MESH_AXES["batch"]]
        B = x.shape[0]
        have_rows = all(leaf.shape[:1] == (B,) for leaf in jax.tree.leaves(others))
        return math.prod(among_others) == 1 and have_rows and B % self.devices_of("batch") == 0

    def _on_rows(
        self, run: Callable[..., Any], prefix: Path, params: Any, x: jax.Array, others: Any
    ) -> Any:
        def stored(keys: Any, p: jax.Array) -> PartitionSpec:
            path = self._parameter_of((*prefix, *keys))
            return self._of_parameter(path, p.shape, fsdp=True).spec

        specs = jax.tree_util.tree_map_with_path(stored, params)

        def whole(p: jax.Array, spec: PartitionSpec) -> jax.Array:
            for dimension, axis in enumerate(spec):  # whose transposition sums and cuts at once
                p = p if axis is None else jax.lax.all_gather(p, axis, axis=dimension, tiled=True)
            return p

        def on_device(params: Any, x: jax.Array, others: Any) -> Any:
            with placed(None):
                return run(jax.tree.map(whole, params, specs), x, others)

        rows = PartitionSpec(MESH_AXES["batch"])
        # All axes are named, or the gradient of x would be summed over those of one device.
        rows_of_x = PartitionSpec(MESH_AXES["batch"], "sequence", "tensor")
        # A mixer from outside the project need not know of axes over which arrays vary.
        return jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(specs, rows_of_x, rows),
            out_specs=rows,
            check_vma=False,
        )(params, x, others)

    def _prefix_of_block(self, params: Any) -> tuple[Any, ...]:
        """Keys before a block's own: those of any block that has the same parameters."""
        paths = {_path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)}
        heads = {path[:2] for path in self._names if path[0] == BLOCKS}
        for head in sorted(heads):
            if paths <= {path[2:] for path in self._names if path[:2] == head}:
                return tuple(jax.tree_util.DictKey(key) for key in head)
        raise ValueError(f"a block has parameters that none of the model's has: {sorted(paths)}")


def _path_of(keys: Any) -> Path:
    """Keys of a tree as text: of dicts, named tuples and sequences."""
    return tuple(
        str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))
        for key in keys
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, used: NamedSharding, back: tuple[NamedSharding, ...]) -> jax.Array:
    """``x`` laid out as ``used``; its gradient as ``back`` says, one after another."""
    return jax.lax.with_sharding_constraint(x, used)


def _moved_forward(x, used, back):
    return _moved(x, used, back), None


def _moved_backward(used, back, _, cotangent):
    # Not as it is used: the sum over devices may then scatter what it sums.
    for sharding in back:
        cotangent = jax.lax.with_sharding_constraint(cotangent, sharding)
    return (cotangent,)


_moved.defvjp(_moved_forward, _moved_backward)
