"""One thin script per question; run as ``python -m experiments.NAME``."""
