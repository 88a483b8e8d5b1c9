"""Flax NNX modules built on the ops."""

from deltaproduct_jax.layers.attention import SoftmaxAttention
from deltaproduct_jax.layers.delta_product import (
    DeltaProductCell,
    DeltaProductState,
    GatedDeltaProduct,
)
from deltaproduct_jax.layers.erase_then_delta import EraseThenDelta
from deltaproduct_jax.layers.gla import GatedLinearAttention
from deltaproduct_jax.layers.kimi_delta import ComplexKimiDeltaAttention, KimiDeltaAttention
from deltaproduct_jax.layers.mamba2 import Mamba2
from deltaproduct_jax.layers.mixer import RecurrentMixer, SequenceMixer
from deltaproduct_jax.layers.mlp import SwiGLU
from deltaproduct_jax.layers.norm import RMSNorm
from deltaproduct_jax.layers.registry import register_mixer
from deltaproduct_jax.layers.rwkv7 import RWKV7
from deltaproduct_jax.layers.short_conv import ShortConv
from deltaproduct_jax.layers.xlstm import MLSTM, SLSTM

__all__ = [
    "MLSTM",
    "RWKV7",
    "SLSTM",
    "ComplexKimiDeltaAttention",
    "DeltaProductCell",
    "DeltaProductState",
    "EraseThenDelta",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "KimiDeltaAttention",
    "Mamba2",
    "RMSNorm",
    "RecurrentMixer",
    "SequenceMixer",
    "ShortConv",
    "SoftmaxAttention",
    "SwiGLU",
    "register_mixer",
]
