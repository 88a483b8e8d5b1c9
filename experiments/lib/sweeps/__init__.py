"""Grids of runs: what they are, who runs them, what came out."""
