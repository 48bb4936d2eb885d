"""Arithmetic on a spec: FLOPs and the size of the state."""
