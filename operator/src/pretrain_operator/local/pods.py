"""Workers as processes: each an agent in its own session, with its ranks below it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from pretrain_operator.cluster import Pod
from pretrain_operator.local import parent_death

PodIdentity = tuple[int, int]
"""(slot, attempt)"""
KILL_SECONDS = 5.0
"""Wait for a killed process that is stuck in the kernel; after it the worker counts as gone."""


@dataclass(frozen=True)
class WorkerCommand:
    """Command line, environment and log file of a worker."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path


@dataclass
class _RunningPod:
    pod: Pod
    process: asyncio.subprocess.Process
    watching: asyncio.Task[None]
    ending: asyncio.Task[None] | None = None


class LocalPods:
    """The worker processes of one job. `changed` is called after each change of `pods`."""

    def __init__(
        self, command: Callable[[int, int], WorkerCommand], clock: Callable[[], float], changed: Callable[[], None]
    ) -> None:
        self._command = command
        self._clock = clock
        self._changed = changed
        self._running: dict[PodIdentity, _RunningPod] = {}
        self._starting = asyncio.Lock()

    @property
    def pods(self) -> tuple[Pod, ...]:
        """Pods that were created and not deleted."""
        return tuple(running.pod for _, running in sorted(self._running.items()))

    async def create(self, slot: int, attempt: int) -> None:
        """Start a worker; succeeds if it was started before. Raises OSError if the start fails."""
        async with self._starting:
            if (slot, attempt) in self._running:
                return
            command = self._command(slot, attempt)
            with command.log.open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *parent_death.command([*command.arguments]),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **command.environment},
                    start_new_session=True,
                )
            pod = Pod(slot, attempt, "Running", node=f"local-{slot}", created_at=self._clock())
            watching = asyncio.create_task(self._watch((slot, attempt), command.log))
            self._running[slot, attempt] = _RunningPod(pod, process, watching)
            self._changed()

    def delete(self, slot: int, attempt: int, grace_seconds: float) -> None:
        """Stop a worker in the background; it leaves `pods` when its process is gone. A later call replaces the grace
        period."""
        if (running := self._running.get((slot, attempt))) is None:
            return
        if not running.pod.alive:
            self._forget((slot, attempt))
            return
        running.pod = replace(running.pod, deleting=True)
        if running.ending is not None:
            running.ending.cancel()
        running.ending = asyncio.create_task(self._end((slot, attempt), running, grace_seconds))
        self._changed()

    def processes(self, slot: int) -> tuple[psutil.Process, ...]:
        """Return the latest live worker of the slot, agent first; empty: none."""
        live = [running for running in self._running.values() if running.pod.slot == slot and running.pod.alive]
        if not live:
            return ()
        return tree_of(max(live, key=lambda running: running.pod.attempt).process.pid)

    async def end_all(self) -> None:
        """SIGKILL every worker and wait until all are gone."""
        for slot, attempt in list(self._running):
            self.delete(slot, attempt, 0.0)
        while waiting := [running.watching for running in self._running.values()]:
            await asyncio.wait(waiting)

    async def _end(self, identity: PodIdentity, running: _RunningPod, grace_seconds: float) -> None:
        if grace_seconds > 0:
            signal_all(tree_of(running.process.pid)[:1], signal.SIGTERM)
            await asyncio.sleep(grace_seconds)
        # Captured before the first kill: descendants of a dead process cannot be found.
        signal_all(tree_of(running.process.pid), signal.SIGKILL)
        await asyncio.sleep(KILL_SECONDS)
        running.watching.cancel()
        self._forget(identity)

    async def _watch(self, identity: PodIdentity, log: Path) -> None:
        running = self._running[identity]
        code = await running.process.wait()
        if running.ending is not None:
            running.ending.cancel()
        running.pod = _finished(running.pod, code, self._clock(), log)
        if running.pod.deleting:
            self._forget(identity)
        else:
            self._changed()

    def _forget(self, identity: PodIdentity) -> None:
        del self._running[identity]
        self._changed()


def _finished(pod: Pod, code: int, now: float, log: Path) -> Pod:
    if code == 0:
        return replace(pod, phase="Succeeded", finished_at=now, exit_code=0, reason="Completed")
    if code < 0:
        name = signal.Signals(-code).name
        return replace(
            pod, phase="Failed", finished_at=now, exit_code=code, reason="Killed", message=f"killed by {name}"
        )
    message = f"exit code {code}: {last_line(log)}"
    return replace(pod, phase="Failed", finished_at=now, exit_code=code, reason="Error", message=message)


def last_line(log: Path) -> str:
    """Return the last non-empty line of a log. Reads the last 4 KiB only."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "the log is empty"


def tree_of(pid: int) -> tuple[psutil.Process, ...]:
    """Return the process and all its descendants, the process first; empty: it is gone."""
    try:
        root = psutil.Process(pid)
        return (root, *root.children(recursive=True))
    except psutil.NoSuchProcess:
        return ()


def signal_all(processes: tuple[psutil.Process, ...], number: signal.Signals) -> None:
    """Send a signal to each process that still exists; reused pids are not signalled."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
