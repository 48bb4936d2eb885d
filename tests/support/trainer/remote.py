"""Runs over sources in S3 for tests of the trainer, and links that mend what is said to be in the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain_api.messages import reports
from pretrain_api.messages.reports import ReportBody
from pretrain_api.messages.trainer_config import TrainerConfig
from support.store.moto import CORPUS
from support.trainer.world import FakeLink, a_config, a_generation

RUNS = "runs"


def a_remote_config(folder: Path, training: Mapping[str, Any] | None = None, **fields: Any) -> TrainerConfig:
    """`a_config` whose data is in the bucket CORPUS and whose cache is `folder`/cache, with room for all."""
    data = {
        "tokenizer": f"s3://{CORPUS}/tokenizer.json",
        "sources": [
            {"name": "prose", "uri": f"s3://{CORPUS}/prose", "weight": 0.7},
            {"name": "code", "uri": f"s3://{CORPUS}/code/", "weight": 0.3},
        ],
    }
    cache = {"path": str(folder / "cache"), "bytes": 1 << 20}
    return a_config(folder, {"data": data, **(training or {})}, **{"cache": cache, **fields})


@dataclass
class MendingLink(FakeLink):
    """Mends what is said to be in the way, with the mender of its reason, and keeps the reports."""

    menders: Mapping[str, Callable[[], object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generation = a_generation()

    def report(self, body: ReportBody) -> None:
        super().report(body)
        if isinstance(body, reports.Blocked):
            self.menders[body.reason]()

    @property
    def said(self) -> list[str]:
        """What was said of being blocked: reasons, and "-" for the end of it."""
        kinds = [body for body in self.reports if isinstance(body, reports.Blocked | reports.Unblocked)]
        return [body.reason if isinstance(body, reports.Blocked) else "-" for body in kinds]

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [body.loss for body in self.reports if isinstance(body, reports.StepDone)]
