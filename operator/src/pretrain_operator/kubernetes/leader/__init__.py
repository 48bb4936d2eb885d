"""Leader election by a Lease, and the duties of the leader."""
