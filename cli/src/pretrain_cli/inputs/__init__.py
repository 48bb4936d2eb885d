"""Job files, overrides, faults and the checks before a run."""
