"""Logical names of the axes of parameters, and the one table from them to axes of a mesh.

A parameter of ours is known by the end of its path and its rank. One from outside may say its names
itself, as Flax does: ``nnx.Param(value, out_sharding=("embed", "heads"), eager_sharding=False)``. A
parameter with neither is whole on every device, but for fsdp.
"""

import re
from collections.abc import Iterable
from typing import Any

from flax import nnx

Path = tuple[str, ...]
Names = tuple[str | None, ...]

# What is cut along which axis of the mesh; batch along two. The other names are for parameters.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("sequence",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
}

# End of a path -> names. The first that fits in path and rank counts.
_OF_PATHS: tuple[tuple[str, Names], ...] = (
    (r"embeddings/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"(attn_|mlp_|^)norm/scale", ("embed",)),
    (r"mlp/(gate|up)_proj/kernel", ("embed", "mlp")),
    (r"mlp/down_proj/kernel", ("mlp", "embed")),
    (r"o_proj/kernel", ("heads", "embed")),
    (r"/(i|f)_proj/kernel", (None, "heads")),
    (r"_proj/kernel", ("embed", "heads")),
    (r"_proj/bias", ("heads",)),
    (r"(gate_|_lora/)down/kernel", ("embed", None)),
    (r"(gate_|_lora/)up/kernel", (None, "heads")),
    (r"gate_up/bias|_lora/bias", ("heads",)),
    (r"/(decay|erase)/down/kernel", ("embed", "heads")),
    (r"/(decay|erase)/up", ("heads", None, None)),
    (r"conv1d/weight", (None, "heads")),
    (r"/(b_bias|c_bias|A_log|dt_bias|D|skip)", ("heads",)),
    (r"o_norm/(scale|bias)", ("heads", None)),
    (r"o_norm/scale", (None,)),
    (r"/(k_k|k_a|r_k)", ("heads", None)),
    (r"/x_[rwkvag]", ("embed",)),
    (r"/[qkv]_blocks", ("heads", None, None)),
    (r"/recurrent", (None, "heads", None, None)),
    (r"/bias", (None, "heads", None)),
)


def names_of(path: Path, rank: int, metadata: Any = None) -> Names | None:
    """Logical names of a parameter's axes; None for one that has none.

    Args:
        path: keys from the model to the parameter.
        rank: its number of axes.
        metadata: names by Flax's ``out_sharding``, which go before the table.
    """
    if metadata is not None:
        return tuple(metadata)
    text = "/".join(path)
    for pattern, names in _OF_PATHS:
        if len(names) == rank and re.search(f"(?:{pattern})$", text):
            return names
    return None


def names_of_model(model: nnx.Module) -> dict[Path, Names | None]:
    """Names of every parameter by its path, of a model or of the shapes of one."""
    variables = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {
        tuple(map(str, path)): names_of(
            tuple(map(str, path)), variable.ndim, variable.get_metadata().get("out_sharding")
        )
        for path, variable in variables
    }


def cut(
    names: Names | None, shape: Iterable[int], sizes: dict[str, int], *, fsdp: bool = True
) -> tuple[str | None, ...]:
    """Axis of the mesh along which each axis of a parameter is cut.

    An axis of the mesh that does not divide the size of its own leaves it whole. fsdp takes the
    axis named for it, or else the longest that it divides.

    Args:
        names: logical names, None for a parameter that has none.
        shape: of the parameter.
        sizes: devices along each axis of the mesh.
        fsdp: whether parameters are cut along that axis: they are stored so, and used whole.
    """
    shape = tuple(shape)
    names = (None,) * len(shape) if names is None else names
    axes: list[str | None] = [None] * len(shape)
    for place, name in enumerate(names):
        (axis,) = MESH_AXES.get(name, (None,)) if name != "embed" else (None,)
        if axis is not None and axis not in axes and shape[place] % sizes[axis] == 0:
            axes[place] = axis
    if not fsdp or sizes["fsdp"] == 1:
        return tuple(axes)
    free = [p for p, axis in enumerate(axes) if axis is None and shape[p] % sizes["fsdp"] == 0]
    if free:
        axes[max(free, key=lambda p: (names[p] == "embed", shape[p]))] = "fsdp"
    return tuple(axes)
