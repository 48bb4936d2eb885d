"""The Cluster port on Kubernetes, and the controllers around it."""
