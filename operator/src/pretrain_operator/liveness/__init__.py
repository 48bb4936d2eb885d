"""Failure detection: one table of time constants, one clock of silence, the rules that end a generation."""
