"""The kernels for CUDA, written with Triton and called through jax-triton."""
