"""How figures and tables are drawn from records."""
