"""The machinery of the experiments; no script."""
