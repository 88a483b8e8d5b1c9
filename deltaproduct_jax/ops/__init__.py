"""Pure functions of arrays: the recurrence in every form."""

from deltaproduct_jax.ops.api import delta_product as delta_product
from deltaproduct_jax.ops.api import delta_product_step as delta_product_step
