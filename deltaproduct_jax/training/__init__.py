"""One training loop and what it needs: configuration, steps, checkpoints, records."""
