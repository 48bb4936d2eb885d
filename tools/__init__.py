"""Generators of the CRD, reference tables and corpora; not shipped."""
