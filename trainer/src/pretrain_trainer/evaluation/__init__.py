"""Evaluation during training: losses on held-out sources, user-defined evaluations, sampled texts."""
