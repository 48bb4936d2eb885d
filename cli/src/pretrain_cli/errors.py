"""Exit codes of all commands, and mistakes on the command line (`problems.InvalidJob` is for the job file)."""

from __future__ import annotations

from enum import IntEnum


class CliExit(IntEnum):
    """Exit codes of `pretrain` commands."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    STOPPED = 130


class BadInput(Exception):
    """The command cannot be carried out; one sentence that names the option and the fix. Exit code 2."""
