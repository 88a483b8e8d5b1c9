"""Language models at the paper's sizes: text for them, and runs with their measurements."""
