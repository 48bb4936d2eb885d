"""Plugins of all suites."""

pytest_plugins = ["support.tools"]
