"""Event files of a run: what TensorBoardWriter would show of it."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportMissingTypeStubs]

from pretrain_api.status.records import EvaluationRecord, SampleRecord, StepRecord
from pretrain_cli.commands.run import run
from pretrain_cli.errors import CliExit
from pretrain_cli.inputs.prepare import RunOptions
from pretrain_cli.render.tensorboard import TensorBoardWriter


def a_record(step: int, **more: Any) -> StepRecord:
    return StepRecord(
        step=step, loss=4.0 / step, grad_norm=1.0, learning_rate=0.1, tokens=9 * step, tokens_per_second=8.0,
        generation=1, workers=2, time=1000.0 + step, seconds=0.5, compute_seconds=0.4, **more,
    )  # fmt: skip


def shown(folder: Path) -> Iterator[tuple[str, int, float, float]]:
    """(tag, step, value, time) of every scalar: records are length, checksum, event, checksum."""
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event: Any = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value, event.wall_time


def test_steps_and_validation_losses_are_shown_with_their_step_and_time(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as board:
        for record in (a_record(1), a_record(2, mfu=0.5)):
            board.step(record)
        board.evaluation(EvaluationRecord(step=2, losses={"prose": 3.0}, seconds=0.1, generation=1, time=1002.5))
        board.evaluation(SampleRecord(step=2, prompt="a", text="b", generation=1, time=1003.0))

    found = list(shown(tmp_path))
    assert [item[1:] for item in found if item[0] == "train/loss"] == [(1, 4.0, 1001.0), (2, 2.0, 1002.0)]
    assert [item[1:3] for item in found if item[0] == "speed/mfu"] == [(2, 0.5)]
    assert [item[1:] for item in found if item[0] == "validation/prose"] == [(2, 3.0, 1002.5)]
    assert [item[1] for item in found if item[0].startswith("sample/0")] == [2]
    assert [item[2] for item in found if item[0] == "step_seconds/compute"] == pytest.approx([0.4, 0.4])


def test_without_the_package_the_run_is_refused_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)

    code = run(RunOptions(Path("no-such-job.yaml"), None, None, (), (), tensorboard=True))

    assert code == CliExit.BAD_INPUT
    assert "needs the package tensorboardX" in capsys.readouterr().err
