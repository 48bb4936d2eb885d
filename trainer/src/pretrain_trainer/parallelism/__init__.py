"""Parallelism: layouts of the model over a mesh of ranks, and reductions over it."""
