"""Messages between the supervisor and the operator process of a local run."""

from __future__ import annotations

from pretrain_api.status.job import Incident, JobStatus
from pretrain_operator.local.control_channel import OPERATOR_MESSAGE, Emit, RequestResult, WriteStatus

LONG = "x" * 100_000


def test_long_texts_pass_whole() -> None:
    incident = Incident(cause="RankFailed", step=1, time=0.0, message=LONG)
    status = WriteStatus(status=JobStatus(incidents=(incident,)))

    assert OPERATOR_MESSAGE.validate_json(status.to_json()) == status
    assert Emit(type="Warning", reason="RankFailed", message=LONG).message == LONG
    assert RequestResult(id=1, error=LONG).error == LONG
