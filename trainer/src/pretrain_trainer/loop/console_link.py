"""The link of an unattended rank 0: what an agent would be told is printed."""

from __future__ import annotations

from pretrain_api.messages.reports import ReportBody
from pretrain_sdk.rank_link import UnattendedLink


class PrintedLink(UnattendedLink):
    """Prints reports as JSON lines on standard output; there are no commands."""

    def report(self, body: ReportBody) -> None:
        """Print a report."""
        print(body.to_json(), flush=True)
