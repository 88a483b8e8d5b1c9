"""The kernel for TPUs, written with Pallas."""
