"""Profiles on demand: a trace of some steps of one rank, put into the store beside the checkpoints.

The ranks agree on the step at which it begins, as on every command, but nobody waits for it: writing, compressing and
uploading the trace happen in a thread while training goes on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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
from pretrain_trainer.core.ranks import Ranks

FOLDER = "profiles/"
KEPT = 10
"""Traces that stay in the store; the oldest go."""
MAX_BYTES = 256 << 20
"""Of a compressed trace; what is larger no viewer opens, and is not kept."""
LAST_SECONDS = 60.0
"""The end of a run waits at most so long for a trace that is being written."""


class Recorder(Protocol):
    """Records what a process does."""

    def start(self) -> None:
        """From now on."""
        ...

    def step(self) -> None:
        """A step is over."""
        ...

    def stop(self) -> None:
        """Until now."""
        ...

    def export_chrome_trace(self, path: str) -> None:
        """Write what was recorded; compressed where the name ends in .gz."""
        ...


def torch_recorder(ranks: Ranks) -> Recorder:
    """torch's profiler, of the host and its accelerator; without shapes and stacks, which make a trace much larger."""
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


class Profiling:
    """This rank's profiles, one at a time. Reports what became of them; never raises."""

    def __init__(
        self,
        ranks: Ranks,
        link: AgentLink,
        storage: Storage,
        environ: Mapping[str, str],
        recorder: Callable[[Ranks], Recorder] = torch_recorder,
    ) -> None:
        self._ranks = ranks
        self._link = link
        self._storage = storage
        self._environ = environ
        self._recorder = recorder
        self._recording: _Recording | None = None
        self._writer: threading.Thread | None = None
        self._outcomes: queue.SimpleQueue[Profiled | ProfileFailed] = queue.SimpleQueue()
        """What the thread has to say: only the loop's own thread may speak to the agent."""

    def begin(self, command: Command, step: int) -> None:
        """`step` is done: record those after it, if this rank is the one that is asked for."""
        if command.rank >= self._ranks.world_size and self._ranks.first:
            there = f"they are 0 to {self._ranks.world_size - 1}" if self._ranks.world_size > 1 else "there is only 0"
            self._refuse(command, f"there is no rank {command.rank}: {there}")
        if command.rank != self._ranks.rank:
            return
        if self._recording is not None or (self._writer is not None and self._writer.is_alive()):
            self._refuse(command, "another profile of this rank is being taken: ask again when it is done")
            return
        try:
            recorder = self._recorder(self._ranks)
            recorder.start()
        except RuntimeError as error:  # Another tool may profile this process already.
            self._refuse(command, f"torch's profiler does not start: {error}")
            return
        self._recording = _Recording(command, recorder, step + 1, step + max(1, command.steps))

    def step_done(self, step: int) -> None:
        """A step is over: it may be the last one that is recorded. Says what became of earlier profiles."""
        while not self._outcomes.empty():
            self._link.report(self._outcomes.get())
        if (recording := self._recording) is None:
            return
        recording.recorder.step()
        if step >= recording.last_step:
            self._stop(recording)

    def finish(self, step: int) -> None:
        """No step comes after this one: write what there is, and wait for it."""
        if (recording := self._recording) is not None:
            if step >= recording.first_step:
                recording.last_step = step
                self._stop(recording)
            else:
                self._refuse(recording.command, "the job was done before a step could be recorded")
        if self._writer is not None:
            self._writer.join(LAST_SECONDS)
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
        with Scratch(Path(self._environ.get("TMPDIR") or "/tmp")) as scratch:
            path = scratch.path / "trace.json.gz"
            recording.recorder.export_chrome_trace(str(path))
            size = path.stat().st_size
            if size > MAX_BYTES:
                message = (
                    f"the trace has {size >> 20} MiB, more than the {MAX_BYTES >> 20} that are kept: ask for fewer"
                )
                return ProfileFailed(command_id=command.id, rank=command.rank, message=f"{message} steps")
            store = open_store(self._storage, self._environ)
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
    """Delete all but the newest traces: by generation, then by step."""
    for old in store.list(FOLDER)[:-KEPT]:
        store.delete(old.key)
