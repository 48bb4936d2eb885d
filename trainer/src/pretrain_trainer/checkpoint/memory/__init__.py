"""Snapshots of the state in the memory of workers."""
