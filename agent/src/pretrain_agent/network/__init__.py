"""Addresses of ranks and coordinator, and the endpoint for metrics and health."""
