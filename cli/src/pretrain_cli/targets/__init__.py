"""Runs and stores that a command acts on."""
