"""Profiles on demand: a trace of some steps of one rank, uploaded to the store next to the checkpoints.

The ranks agree on the first step, as on every command, but none waits for the profile: a thread writes, compresses and
uploads the trace while training continues.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from torch.profiler import ProfilerActivity, profile

from pretrain_api.messages.protocol import Command
from pretrain_api.messages.reports import Profiled, ProfileFailed
from pretrain_api.spec.job import Storage
from pretrain_sdk.rank_link import AgentLink
from pretrain_sdk.scratch import Scratch
from pretrain_store.errors import StoreError
from pretrain_store.open import open_store
from pretrain_store.port import ObjectStore
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.ranks import Ranks

FOLDER = "profiles/"
KEPT = 10
"""Traces kept in the store; the oldest are deleted."""
MAX_BYTES = 256 << 20
"""Largest compressed trace that is kept; viewers do not open larger ones."""
LAST_SECONDS = 60.0
"""Longest wait at the end of a run for a trace that is being written."""


class Recorder(Protocol):
    """Records the operations of a process."""

    def start(self) -> None:
        """Start recording."""
        ...

    def step(self) -> None:
        """Mark the end of a step."""
        ...

    def stop(self) -> None:
        """Stop recording."""
        ...

    def export_chrome_trace(self, path: str) -> None:
        """Write the trace; compressed where the name ends in .gz."""
        ...


def torch_recorder(ranks: Ranks) -> Recorder:
    """Create torch's profiler of host and accelerator, without shapes and stacks, which make a trace much larger."""
    activities = [ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


@dataclass
class _Recording:
    command: Command
    recorder: Recorder
    first_step: int
    last_step: int


class Profiler:
    """Profiles of this rank, one at a time. Reports their outcomes; never raises."""

    def __init__(
        self,
        ranks: Ranks,
        link: AgentLink,
        storage: Storage,
        environment: Environment,
        recorder: Callable[[Ranks], Recorder] = torch_recorder,
    ) -> None:
        self._ranks = ranks
        self._link = link
        self._storage = storage
        self._environment = environment
        self._recorder = recorder
        self._recording: _Recording | None = None
        self._writer: threading.Thread | None = None
        self._outcomes: queue.SimpleQueue[Profiled | ProfileFailed] = queue.SimpleQueue()
        """Outcomes from the thread: only the loop's own thread may use the link."""

    def begin(self, command: Command, step: int) -> None:
        """Record the steps after `step`, if the command names this rank."""
        if command.rank >= self._ranks.world_size and self._ranks.first:
            there = f"they are 0 to {self._ranks.world_size - 1}" if self._ranks.world_size > 1 else "there is only 0"
            self._refuse(command, f"there is no rank {command.rank}: {there}")
        if command.rank != self._ranks.rank:
            return
        if self._recording is not None or (self._writer is not None and self._writer.is_alive()):
            self._refuse(command, "another profile of this rank is being recorded: ask again when it is done")
            return
        try:
            recorder = self._recorder(self._ranks)
            recorder.start()
        except RuntimeError as error:  # Another tool may already profile this process.
            self._refuse(command, f"torch's profiler does not start: {error}")
            return
        self._recording = _Recording(command, recorder, step + 1, step + max(1, command.steps))

    def step_done(self, step: int, *, last: bool) -> None:
        """End a step, and the recording with the last step of the command or the run. Report earlier outcomes."""
        self._report_outcomes()
        if (recording := self._recording) is None:
            return
        recording.recorder.step()
        if last or step >= recording.last_step:
            recording.last_step = step
            self._stop(recording)

    def finish(self) -> None:
        """Wait for a trace that is being written, and report it. No step follows."""
        if self._recording is not None:
            self._refuse(self._recording.command, "the job was done before a step could be recorded")
        if self._writer is not None:
            self._writer.join(LAST_SECONDS)
        self._report_outcomes()

    def _report_outcomes(self) -> None:
        while not self._outcomes.empty():
            self._link.report(self._outcomes.get())

    def _stop(self, recording: _Recording) -> None:
        self._recording = None
        recording.recorder.stop()
        self._writer = threading.Thread(target=self._write, args=(recording,), name="profile", daemon=True)
        self._writer.start()

    def _write(self, recording: _Recording) -> None:
        command = recording.command
        try:
            outcome = self._put(recording)
        except (OSError, RuntimeError, StoreError) as error:
            outcome = ProfileFailed(command_id=command.id, rank=command.rank, message=str(error))
        self._outcomes.put(outcome)

    def _put(self, recording: _Recording) -> Profiled | ProfileFailed:
        command, first, last = recording.command, recording.first_step, recording.last_step
        key = f"{FOLDER}g{command.generation:06d}/steps-{first:09d}-{last:09d}-rank-{command.rank}.json.gz"
        with Scratch(self._environment.scratch) as scratch:
            path = scratch.path / "trace.json.gz"
            recording.recorder.export_chrome_trace(str(path))
            size = path.stat().st_size
            if size > MAX_BYTES:
                message = f"the trace has {size >> 20} MiB, more than {MAX_BYTES >> 20}: ask for fewer steps"
                return ProfileFailed(command_id=command.id, rank=command.rank, message=message)
            store = open_store(self._storage, self._environment.variables)
            store.put_file(key, path)
        with suppress(StoreError):
            prune(store)
        place = self._storage.path or store.describe()
        return Profiled(
            command_id=command.id,
            rank=command.rank,
            first_step=first,
            last_step=last,
            location=f"{place}/{key}",
            bytes=size,
        )

    def _refuse(self, command: Command, message: str) -> None:
        self._link.report(ProfileFailed(command_id=command.id, rank=command.rank, message=message))


def prune(store: ObjectStore) -> None:
    """Delete all but the newest traces, by generation, then by step."""
    for old in store.list(FOLDER)[:-KEPT]:
        store.delete(old.key)
