"""Parts of a block of a model outside its mixer."""
