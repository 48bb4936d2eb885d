"""Grafana dashboards as code. `python -m dashboards` writes the chart's JSON files."""
