"""Flax NNX modules built on the op."""
