"""The coordinator, the reconciler and the clusters they act on."""
