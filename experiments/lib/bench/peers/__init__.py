"""Other projects' implementations, called as their users call them."""
