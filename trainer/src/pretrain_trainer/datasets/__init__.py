"""Data: shards, the order of their tokens, cache and prefetching."""
