"""DeltaProduct in JAX: linear RNNs whose state transition is a product of Householder factors."""

from deltaproduct_jax.layers import DeltaProductCell as DeltaProductCell
from deltaproduct_jax.layers import DeltaProductState as DeltaProductState
from deltaproduct_jax.layers import GatedDeltaProduct as GatedDeltaProduct
from deltaproduct_jax.models import ModelConfig as ModelConfig
from deltaproduct_jax.models import SequenceModel as SequenceModel
from deltaproduct_jax.ops import delta_product as delta_product
from deltaproduct_jax.ops import delta_product_step as delta_product_step
from deltaproduct_jax.ops import select_implementation as select_implementation
from deltaproduct_jax.ops import sharded_delta_product as sharded_delta_product
