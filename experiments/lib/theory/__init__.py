"""How long constructions hold, and what their factors and those of trained models look like."""
