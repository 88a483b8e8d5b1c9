"""Operations of a program's products, from its trace: of what is computed, not of what is timed."""

import math
from typing import Any

import jax
import jax.extend


def product_operations(jaxpr: jax.extend.core.Jaxpr, platform: str) -> int:
    """Multiplications and additions of all products of matrices, on all devices together.

    Loops count as often as they run, what is computed anew backwards counts again, and kernels of
    Pallas count by their grid. Of the forms that a program has for several platforms one counts; of
    other branches the dearest. A `while` loop counts once, since its trace does not say more, and
    kernels of Triton count nothing.

    Args:
      jaxpr: of a program, as a trace has it.
      platform: what it is compiled for: "cpu", "cuda" or "tpu".
    """
    return sum(_of_equation(equation, platform) for equation in jaxpr.eqns)


def _of_equation(equation: Any, platform: str) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_dot(equation)
    if name == "conv_general_dilated":
        kernel, out = equation.invars[1].aval, equation.outvars[0].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * out.size * kernel.size // features
    if name == "cond":
        return _of_branches(params, platform)
    inner = jax.extend.core.jaxprs_in_params(params)
    return _times(name, params) * sum(product_operations(each, platform) for each in inner)


def _of_dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    return 2 * out.size * math.prod(left.shape[axis] for axis in contracted)


def _of_branches(params: dict[str, Any], platform: str) -> int:
    """Of the platform's own branch, else of the one without a platform, else of the dearest."""
    branches = [branch.jaxpr for branch in params["branches"]]
    platforms = params.get("branches_platforms")
    if platforms is not None:
        own = [b for b, names in zip(branches, platforms, strict=True) if platform in (names or ())]
        default = [b for b, names in zip(branches, platforms, strict=True) if not names]
        return product_operations((own or default)[0], platform)
    return max(product_operations(branch, platform) for branch in branches)


def _times(name: str, params: dict[str, Any]) -> int:
    """How often an equation runs what is inside it, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        manual = params.get("manual_axes", params["mesh"].axis_names)
        return math.prod(params["mesh"].shape[axis] for axis in manual)
    return 1
