"""What compilers and single kernels tell of GPUs and TPUs."""
