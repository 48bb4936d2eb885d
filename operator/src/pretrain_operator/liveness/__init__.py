"""Liveness of a generation: evidence and rules."""
