"""Projections of the facts of a run onto its status."""
