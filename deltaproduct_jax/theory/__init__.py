"""The theorems about DeltaProduct as programs: parameters that track a group, and limits."""

from deltaproduct_jax.theory.catalogue import CATALOGUE as CATALOGUE
from deltaproduct_jax.theory.catalogue import construct as construct
from deltaproduct_jax.theory.construction import Construction as Construction
from deltaproduct_jax.theory.layered import by_blocks as by_blocks
from deltaproduct_jax.theory.layered import two_layers as two_layers
from deltaproduct_jax.theory.one_layer import group_in_one_layer as group_in_one_layer
from deltaproduct_jax.theory.one_layer import permutation_reset as permutation_reset
