"""Messages between the supervisor and the operator process of a local run."""

from __future__ import annotations

from pretrain_api.bounds import MAX_TEXT
from pretrain_operator.local.control_channel import Emit, RequestResult


def test_long_texts_are_cut_and_end_nothing() -> None:
    event = Emit(type="Warning", reason="RankFailed", message="x" * 100_000)
    result = RequestResult(id=1, error="x" * 100_000)

    assert len(event.message) == len(result.error) == MAX_TEXT
