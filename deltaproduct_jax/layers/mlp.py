"""The channel mixer of a block: SwiGLU."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from deltaproduct_jax.layers.checks import check_width, checks_arguments
from deltaproduct_jax.layers.initializers import mlp_down_init
from deltaproduct_jax.layers.norm import RMSNorm
from deltaproduct_jax.layers.projection import over_tokens
from deltaproduct_jax.ops.blocks import rows
from deltaproduct_jax.ops.blocks.rows import HIDDEN_POINT as POINT
from deltaproduct_jax.ops.parts import placement


def swiglu_width(hidden_size: int, hidden_ratio: float = 4.0) -> int:
    """Width of the hidden layer when none is given: two thirds of the ratio, up to the next 256."""
    return 256 * -(-int(hidden_size * hidden_ratio * 2 / 3) // 256)


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` without biases (Shazeer, 2020, "GLU variants").

    Args:
        hidden_size: width ``D`` of input and output.
        intermediate_size: width of the hidden layer.
        num_layers: depth of the model, by which the paper's initialisation scales ``down``.
        initializer: ``"paper"`` or ``"fla"``.
        initializer_range: standard deviation of the normal draws.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.
        rngs: source of the parameter keys.
    """

    @checks_arguments
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_layers: int = 1,
        initializer: str = "paper",
        initializer_range: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        normal = nnx.initializers.normal(initializer_range)
        down = mlp_down_init(initializer, initializer_range, intermediate_size, num_layers)
        shared = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        shared |= {"dot_general": over_tokens}
        self.hidden_size = hidden_size
        self.gate_proj = nnx.Linear(hidden_size, intermediate_size, kernel_init=normal, **shared)
        self.up_proj = nnx.Linear(hidden_size, intermediate_size, kernel_init=normal, **shared)
        self.down_proj = nnx.Linear(intermediate_size, hidden_size, kernel_init=down, **shared)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Applies the layer to every token on its own."""
        check_width("x", x, self.hidden_size)
        gate, up = (checkpoint_name(f(x), POINT) for f in (self.gate_proj, self.up_proj))
        return self.down_proj(nnx.silu(gate) * up)

    def residual(
        self,
        x: Float[Array, "B T D"],
        more: Float[Array, "B T D"],
        reached: Bool[Array, "B T"],
        norm: RMSNorm,
        keeps: bool = False,
    ) -> Float[Array, "B T D"]:
        """``z + self(norm(z))`` of ``z = x + more``; all in the dtype of ``x``.

        ``reached`` are tokens whose ``more`` is NaN, and ``keeps`` is of ``ops/blocks/rows.py``.
        """
        # Over a mesh, which may cut its columns, an axis of its own keeps gate and up apart.
        axis = 1 if placement() is None else None
        joined = getattr(self, "joined", None) or self.joined_kernels(axis)
        first = joined["gate_up"][...].astype(x.dtype)
        down = self.down_proj.kernel[...].astype(x.dtype)
        arrays = x, more, reached, norm.scale[...], first, down
        return rows.residual_swiglu(*arrays, norm.eps, keeps)

    def joined_kernels(self, axis: int | None = 1) -> dict[str, jax.Array]:
        """The kernels of gate and up along one axis; None: a new one between the others."""
        kernels = [m.kernel[...] for m in (self.gate_proj, self.up_proj)]
        if axis is None:
            return {"gate_up": jnp.stack(kernels, axis=1)}
        return {"gate_up": jnp.concatenate(kernels, axis=axis)}
