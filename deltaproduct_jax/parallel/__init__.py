"""Training over many devices: the mesh, where arrays lie on it, and the processes that share it."""
