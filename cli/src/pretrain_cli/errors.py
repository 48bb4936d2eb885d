"""Mistakes of the command line, beside `problems.InvalidJob` for those of the job file."""

from __future__ import annotations


class BadInput(Exception):
    """What was asked for can't be done; one sentence that names the option and the remedy. Exit code 2."""
