"""Models that are trained on the same text, each a leg: what one is, and many of them at once."""
