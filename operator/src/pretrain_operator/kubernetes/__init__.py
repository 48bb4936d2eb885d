"""Kubernetes: API client, worker pods, job controllers, leader election and the operator process."""
