"""Local runs: processes in place of pods."""
