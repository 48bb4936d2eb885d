"""Jobs on Kubernetes: what is read from the API server, what is written to it, and who may act."""
