"""Injection of faults into a running local cluster."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from pretrain_api.status.job import JobStatus
from pretrain_cli.inputs.faults import Fault
from pretrain_operator.local.supervisor import Supervisor

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


class FaultInjector:
    """Injects each fault once its step is done; a fault without its target waits for it."""

    def __init__(self, faults: Sequence[Fault], supervisor: Supervisor) -> None:
        self._pending = list(faults)
        self._supervisor = supervisor
        self._ranks: dict[int, tuple[int, int]] = {}

    @property
    def pending(self) -> tuple[Fault, ...]:
        """Faults not injected yet."""
        return tuple(self._pending)

    def advance(self, step: int) -> None:
        """Inject the faults due at this step. Called for steps and other changes."""
        self._ranks.update(ranks_of(self._supervisor.status))
        for fault in [fault for fault in self._pending if fault.due <= step]:
            # Removed first: an injection causes events and views, which may call this again.
            self._pending.remove(fault)
            if not self._inject(fault):
                self._pending.append(fault)

    def _inject(self, fault: Fault) -> bool:
        supervisor = self._supervisor
        if fault.replicas:
            replicas = supervisor.job.spec.workers.replicas + fault.replicas
            supervisor.scale(replicas, f"{fault.text}: {replicas} workers desired now")
            return True
        if fault.target == "data":  # The ranks have known it since their start: only announce it.
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
        # A pid of an earlier generation no longer belongs to the worker.
        process = [process for process in self._supervisor.processes(slot) if process.pid == pid]
        if process:
            self._supervisor.inject(fault.text, slot, process, SIGNALS[fault.action])
        return bool(process)


def ranks_of(status: JobStatus) -> dict[int, tuple[int, int]]:
    """Map known global ranks to (slot, pid); a restarted operator does not know them."""
    return {rank: (worker.slot, pid) for worker in status.workers for rank, pid in worker.pids.items()}
