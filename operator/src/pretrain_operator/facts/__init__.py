"""Facts of a run: what agents, pods, nodes and the coordinator established, each recorded once."""
