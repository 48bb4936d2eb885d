"""Object stores, checkpoint lineage, manifests and retention."""
