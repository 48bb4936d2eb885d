"""`python -m pretrain_agent`."""

from __future__ import annotations

import os
import sys

from pretrain_agent.system.init import leave_init_behind


def main() -> None:
    """Run the agent and exit with its exit code."""
    leave_init_behind()
    # Imported here since a fork server may import this module in every rank.
    from pretrain_agent.settings import parse_settings
    from pretrain_agent.worker.runner import run_agent

    code = run_agent(parse_settings(sys.argv[1:]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # A normal exit waits for every rank, and for one stuck in the kernel forever.


if __name__ == "__main__":
    main()
