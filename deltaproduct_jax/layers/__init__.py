"""Flax NNX modules built on the op."""

from deltaproduct_jax.layers.delta_product import DeltaProductCell as DeltaProductCell
from deltaproduct_jax.layers.delta_product import DeltaProductState as DeltaProductState
from deltaproduct_jax.layers.delta_product import GatedDeltaProduct as GatedDeltaProduct
from deltaproduct_jax.layers.mlp import SwiGLU as SwiGLU
from deltaproduct_jax.layers.norm import RMSNorm as RMSNorm
from deltaproduct_jax.layers.short_conv import ShortConv as ShortConv
