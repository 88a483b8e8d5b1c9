"""What bad rows and heads are done again by, on GPUs: kernels in Triton."""
