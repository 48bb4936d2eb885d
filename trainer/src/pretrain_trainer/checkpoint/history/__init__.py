"""Lineage of a run's checkpoints: claim, join, commit, rollback."""
