"""Parts of a model outside its mixers: `rows` and `logits` are asked, the others stand behind."""
