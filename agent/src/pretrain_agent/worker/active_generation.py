"""State of the generation that runs on this worker."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from pretrain_agent.torchrun.mailbox import Assignment
from pretrain_agent.worker.rank_server import RankServer
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import Failed
from pretrain_sdk.rank_logs import last_lines, rank_log

log = structlog.get_logger()


@dataclass
class ActiveGeneration:
    """The generation whose ranks run here, and what they have reported so far."""

    assignment: Assignment
    server: RankServer
    started: set[int] = field(default_factory=set[int])
    explained: set[int] = field(default_factory=set[int])
    """Ranks that reported themselves why they exit."""
    stepped: bool = False
    """The first step, which ends a recovery, is reported."""
    held: asyncio.Event = field(default_factory=asyncio.Event)
    """The ranks hold at a step boundary whose checkpoint is committed."""
    rolled_to: int = 0
    """Number that the ranks took by a rollback; 0: none."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def generation(self) -> Generation:
        """The generation."""
        return self.assignment.generation

    @property
    def number(self) -> int:
        """The generation's number."""
        return self.generation.number

    def failure(self, rank: int, code: int, run_dir: Path | None) -> Failed:
        """Report the exit of a rank that reported no reason itself, with the end of its output."""
        log.warning("rank failed", rank=rank, exit_code=code, generation=self.number)
        how = f"killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        output = last_lines(rank_log(run_dir, self.number, rank, "err")) if run_dir else ""
        output = output or self.server.last_words.get(rank - self.assignment.first_rank, "")
        return Failed(
            rank=rank,
            exit_code=code,
            reason="Killed" if code == -signal.SIGKILL else "ExitCode",
            message=f"rank {rank}: {how}\n{output}".strip(),
        )


class StepTracker:
    """Latest step of the local ranks and the duration of the last one, for hello messages."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._advanced_at: float | None = None
        self.step = 0
        self.step_seconds = 0.0
        """Duration of the last step as seen from here; 0: unknown."""

    def restart(self) -> None:
        """Start a new generation, in which no step is done yet."""
        self._advanced_at = None

    def advance(self, step: int) -> None:
        """Record that a rank completed `step`."""
        now = self._clock()
        if self._advanced_at is not None and step > self.step:
            self.step_seconds = max(0.0, now - self._advanced_at) / (step - self.step)
        if self._advanced_at is None or step > self.step:
            self._advanced_at = now
        self.step = step

    @property
    def seconds_since_advance(self) -> float | None:
        """Seconds since the last new step; None: no step in this generation yet."""
        return None if self._advanced_at is None else max(0.0, self._clock() - self._advanced_at)
