"""Prometheus metrics of jobs and of the operator."""
