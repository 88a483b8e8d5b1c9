"""Kernels of short rows: products with what stands around them, while a row is in registers."""
