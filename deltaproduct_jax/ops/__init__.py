"""Pure functions of arrays: the recurrence in every form."""

from deltaproduct_jax.ops.api import delta_product as delta_product
from deltaproduct_jax.ops.api import delta_product_step as delta_product_step
from deltaproduct_jax.ops.cut import default_chunk_size as default_chunk_size
from deltaproduct_jax.ops.debug import checked as checked
from deltaproduct_jax.ops.dispatch import RESIDUAL_NAMES as RESIDUAL_NAMES
from deltaproduct_jax.ops.packing import carry_state as carry_state
from deltaproduct_jax.ops.packing import cu_seqlens_from_segment_ids as cu_seqlens_from_segment_ids
from deltaproduct_jax.ops.packing import segment_ids_from_cu_seqlens as segment_ids_from_cu_seqlens
from deltaproduct_jax.ops.selection import select_implementation as select_implementation
from deltaproduct_jax.ops.sharding import sharded_delta_product as sharded_delta_product
