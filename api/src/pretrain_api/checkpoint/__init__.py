"""Lineage records, manifests and run identity, as stored beside the checkpoints."""
