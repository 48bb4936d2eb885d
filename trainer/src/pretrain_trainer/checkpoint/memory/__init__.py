"""Snapshots in the memory of workers."""
