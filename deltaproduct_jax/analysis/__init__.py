"""What trained models do: the geometry of their transitions."""
