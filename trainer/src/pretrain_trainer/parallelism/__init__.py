"""How ranks share a model and a step: the mesh, its layouts, and the sums over it."""
