"""DeltaProduct in JAX: linear RNNs whose state transition is a product of Householder factors."""
