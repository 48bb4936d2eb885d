"""The link of an unattended rank 0: what an agent would be told is printed."""

from __future__ import annotations

from pretrain_agent.client import UnattendedLink
from pretrain_api.reports import ReportBody


class PrintedLink(UnattendedLink):
    """Prints reports as JSON lines on standard output; there are no commands."""

    def report(self, body: ReportBody) -> None:
        """Print a report."""
        print(body.to_json(), flush=True)
