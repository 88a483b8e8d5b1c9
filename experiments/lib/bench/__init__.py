"""Inputs, timing, errors and peers of the benchmarks."""
