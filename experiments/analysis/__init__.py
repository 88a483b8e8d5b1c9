"""What trained models and constructions look like inside."""
