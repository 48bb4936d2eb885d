"""Detection of divergence, and the response to it."""
