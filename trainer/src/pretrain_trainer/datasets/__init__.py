"""The tokens of every step: shards, their order, and fetching them ahead of need."""
