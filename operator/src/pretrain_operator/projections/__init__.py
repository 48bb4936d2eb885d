"""Projections: pure folds of a run's facts onto slices of its status."""
