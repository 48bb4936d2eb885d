"""Generators of the documentation: pages of reference and diagrams that follow from the code, and the site's hooks."""
