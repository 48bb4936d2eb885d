"""Estimates: FLOPs, size of the state, throughput and completion time."""
