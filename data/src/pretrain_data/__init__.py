"""Tokenised datasets: writing and verification."""
