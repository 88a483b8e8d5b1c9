"""Flax NNX modules built on the ops."""

from deltaproduct_jax.layers.attention import SoftmaxAttention as SoftmaxAttention
from deltaproduct_jax.layers.delta_product import DeltaProductCell as DeltaProductCell
from deltaproduct_jax.layers.delta_product import DeltaProductState as DeltaProductState
from deltaproduct_jax.layers.delta_product import GatedDeltaProduct as GatedDeltaProduct
from deltaproduct_jax.layers.gla import GatedLinearAttention as GatedLinearAttention
from deltaproduct_jax.layers.mamba2 import Mamba2 as Mamba2
from deltaproduct_jax.layers.mixer import RecurrentMixer as RecurrentMixer
from deltaproduct_jax.layers.mixer import SequenceMixer as SequenceMixer
from deltaproduct_jax.layers.mlp import SwiGLU as SwiGLU
from deltaproduct_jax.layers.norm import RMSNorm as RMSNorm
from deltaproduct_jax.layers.registry import register_mixer as register_mixer
from deltaproduct_jax.layers.rwkv7 import RWKV7 as RWKV7
from deltaproduct_jax.layers.short_conv import ShortConv as ShortConv
from deltaproduct_jax.layers.xlstm import MLSTM as MLSTM
from deltaproduct_jax.layers.xlstm import SLSTM as SLSTM
