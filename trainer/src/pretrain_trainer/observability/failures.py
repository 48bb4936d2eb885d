"""Translation of an exception to the end of the process: report, message, exit code."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from pretrain_api.messages.reports import CheckpointRejected, Failed, NumberTaken, ReportBody
from pretrain_api.messages.trainer_config import ExitCode
from pretrain_api.spec.training import Training
from pretrain_trainer.core.errors import (
    CheckpointRejectedError,
    CollectiveFailed,
    NumberTakenError,
    TrainerError,
)
from pretrain_trainer.observability.memory_advice import PeakMemory, advice

_COLLECTIVE_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "gloo/",
    "gloo ",
    "nccl",
    "socket timeout",
    "timed out waiting",
)
"""Parts of messages of the plain RuntimeErrors that torch raises when a peer is lost."""
_MEMORY_SIGNS = ("defaultcpuallocator", "out of memory")
MESSAGE_LENGTH = 2000


@dataclass(frozen=True)
class ProcessExit:
    """The end of a process. Each rank reports it, even if all raise the same error: a silent one would look killed."""

    exit_code: ExitCode
    message: str
    report: ReportBody
    expected: bool
    """True for a known error; for others a traceback is printed."""

    def with_snapshot(self, location: str) -> ProcessExit:
        """Add the location of the memory snapshot; none if it is empty."""
        if not location or not isinstance(self.report, Failed):
            return self
        added = f"; memory snapshot: {location}"
        report = self.report.model_copy(update={"message": self.report.message + added})
        return replace(self, message=self.message + added, report=report)


def process_exit(error: BaseException, rank: int, training: Training | None = None) -> ProcessExit:
    """Return the end that this error causes. `training` is for advice when memory is exhausted."""
    known = known_error(error, training)
    if known is None:
        message = str(error)[:MESSAGE_LENGTH]
        report = Failed(rank=rank, exit_code=ExitCode.FAILED, reason=type(error).__name__, message=message)
        return ProcessExit(ExitCode.FAILED, f"{type(error).__name__}: {message}", report, expected=False)
    return ProcessExit(known.exit_code, str(known), _report(known, rank), expected=True)


class _OutOfMemory(TrainerError):
    exit_code = ExitCode.OUT_OF_MEMORY

    @property
    def reason(self) -> str:
        return "OutOfMemory"


def known_error(error: BaseException, training: Training | None = None) -> TrainerError | None:
    """Classify an error; None for one that is a bug."""
    if isinstance(error, TrainerError):
        return error
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in text for sign in _MEMORY_SIGNS):
        cause = f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"[:MESSAGE_LENGTH]
        remedy = advice(training, PeakMemory.now()) if training is not None else "lower training.batch.microBatch"
        return _OutOfMemory(f"out of memory: {remedy} {cause}")
    if isinstance(error, dist.DistError | ConnectionError):  # a ConnectionError comes from a lost agent
        return CollectiveFailed(str(error))
    if isinstance(error, RuntimeError) and any(sign in text for sign in _COLLECTIVE_SIGNS):
        return CollectiveFailed(str(error))
    return None


def _report(error: TrainerError, rank: int) -> ReportBody:
    match error:
        case CheckpointRejectedError():
            return CheckpointRejected(checkpoint=error.key, message=error.message)
        case NumberTakenError():
            return NumberTaken(highest=error.highest)
        case _:
            return Failed(
                rank=rank,
                exit_code=error.exit_code,
                reason=error.reason,
                message=str(error)[:MESSAGE_LENGTH],
                retryable=error.retryable,
            )
