"""Carries out faults on a running local cluster."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from pretrain_api.status.job import JobStatus
from pretrain_cli.inputs.faults import Fault
from pretrain_operator.local.supervisor import Supervisor

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


class Injector:
    """Injects each fault once its step is done. One whose target is away just then waits for it to be there."""

    def __init__(self, faults: Sequence[Fault], supervisor: Supervisor) -> None:
        self._pending = list(faults)
        self._supervisor = supervisor
        self._ranks: dict[int, tuple[int, int]] = {}

    @property
    def pending(self) -> tuple[Fault, ...]:
        """Those not yet injected."""
        return tuple(self._pending)

    def advance(self, step: int) -> None:
        """The job has done this step, or something else changed: inject what is due."""
        self._ranks.update(ranks_of(self._supervisor.status))
        for fault in [fault for fault in self._pending if fault.due <= step]:
            # Taken out first: an injection makes events and views, which may come back here.
            self._pending.remove(fault)
            if not self._inject(fault):
                self._pending.append(fault)

    def _inject(self, fault: Fault) -> bool:
        supervisor = self._supervisor
        if fault.replicas:
            replicas = supervisor.job.spec.workers.replicas + fault.replicas
            supervisor.scale(replicas, f"{fault.text}: {replicas} workers are wanted now")
            return True
        if fault.target == "data":  # The ranks know of it since their start: here it is only said.
            supervisor.inject(fault.text, None, (), None)
            return True
        if fault.target == "coordinator":
            return supervisor.kill_operator(fault.text)
        if fault.number is None:
            raise AssertionError(f"{fault.text} was parsed without a number")
        if fault.target == "rank":
            return self._kill_rank(fault, fault.number)
        processes = supervisor.processes(fault.number)
        if fault.target == "agent" or fault.action == "term":
            processes = processes[:1]
        if processes:
            supervisor.inject(fault.text, fault.number, processes, SIGNALS[fault.action])
        return bool(processes)

    def _kill_rank(self, fault: Fault, rank: int) -> bool:
        if (found := self._ranks.get(rank)) is None:
            return False
        slot, pid = found
        # A pid of the generation before is none of the worker's any more.
        process = [process for process in self._supervisor.processes(slot) if process.pid == pid]
        if process:
            self._supervisor.inject(fault.text, slot, process, SIGNALS[fault.action])
        return bool(process)


def ranks_of(status: JobStatus) -> dict[int, tuple[int, int]]:
    """Global rank -> (slot, pid), as far as known: an operator that was restarted does not know them."""
    return {rank: (worker.slot, pid) for worker in status.workers for rank, pid in worker.pids.items()}
