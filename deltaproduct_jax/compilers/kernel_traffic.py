"""Bytes that a Pallas kernel for TPU moves between HBM and vector memory, from its grid.

The pipeline around a kernel copies a block in when the index of the block differs from that of the
step before, and out when it changes or the grid ends. So each array counts once for every run of
steps on one block, and blocks on which no step works count nothing.
"""

import itertools
import math

import jax
import jax.extend
import numpy as np


def kernel_bytes(jaxpr: jax.extend.core.Jaxpr) -> dict[str, list[int]]:
    """Bytes by the name of the kernel, an entry an array: operands, then results.

    Kernels without a name, or whose blocks may be chosen by numbers of the run, are left out.

    Args:
      jaxpr: of a program, as a trace has it; kernels of one name must be of one cut.

    Raises:
      ValueError: two kernels share a name and move different bytes.
    """
    found: dict[str, list[int]] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            mapping = equation.params["grid_mapping"]
            if mapping.num_index_operands or equation.params["name"] is None:
                continue
            moved = [_bytes(block, mapping.grid) for block in mapping.block_mappings]
            parts = [{equation.params["name"]: moved}]
        else:
            parts = map(kernel_bytes, jax.extend.core.jaxprs_in_params(equation.params))
        for name, moved in itertools.chain.from_iterable(part.items() for part in parts):
            if found.setdefault(name, moved) != moved:
                raise ValueError(f"several kernels named {name} move {found[name]} and {moved}")
    return found


def _bytes(block, grid: tuple[int, ...]) -> int:
    runs = 1
    if grid:
        steps = np.indices(grid, dtype=np.int32).reshape(len(grid), -1)
        index_map = jax.extend.core.jaxpr_as_fun(block.index_map_jaxpr)
        indices = np.stack(np.broadcast_arrays(*jax.vmap(index_map)(*steps)), axis=-1)
        runs += np.any(indices[1:] != indices[:-1], axis=-1).sum()
    sizes = (getattr(size, "block_size", size) for size in block.block_shape)
    return int(runs) * math.prod(sizes) * block.array_aval.dtype.itemsize
