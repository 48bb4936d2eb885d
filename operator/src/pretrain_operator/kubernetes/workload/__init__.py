"""Pods and configuration of a job's workers. Pure."""
