"""Observability: step times, memory, MFU, profiles, and how a rank failed."""
