"""How fast, how exact and how scalable the op and a training step are."""
