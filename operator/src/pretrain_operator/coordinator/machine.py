"""The coordinator of one job as a pure state machine: it decides which agents form a generation and when it ends.

Every input updates the state, then `_advance` evaluates all of it: it admits agents, ends a generation, forms the next
one and notifies agents. Hence the result does not depend on the order of inputs. The machine reads no clock and does no
I/O; times are unix seconds that never decrease.
"""

from __future__ import annotations

from typing import Literal

from pretrain_api.messages import protocol, reports
from pretrain_api.messages.protocol import Generation, Hello
from pretrain_operator.coordinator.formation import Formation
from pretrain_operator.coordinator.handshake import FailedWorkers, compare_claim, rejection
from pretrain_operator.coordinator.lineage_state import LineageState
from pretrain_operator.coordinator.liveness_monitor import LivenessMonitor
from pretrain_operator.coordinator.members import Agent, ConnectionId, Roster
from pretrain_operator.coordinator.message_parser import Refusal
from pretrain_operator.coordinator.output import CoordinatorOutput, OutputBuffer
from pretrain_operator.coordinator.running_generation import RunningGeneration
from pretrain_operator.coordinator.step_boundary import StepBoundary
from pretrain_operator.coordinator.types import CoordinatorView, Want
from pretrain_operator.facts.fact import GenerationAnnounced, GenerationEnded, Reported, is_step
from pretrain_operator.liveness.rules import GenerationVerdict
from pretrain_operator.liveness.timings import Timings

ShutdownReason = Literal["succeeded", "failed", "suspended", "superseded", "removed"]


class Coordinator:
    """Forms and ends the generations of one job: at most one at a time, with increasing numbers."""

    def __init__(self, job_uid: str, epoch: int, highest_number: int, timings: Timings) -> None:
        self._job_uid = job_uid
        self._epoch = epoch
        self._timings = timings
        self._outbox = OutputBuffer(epoch)
        self._roster = Roster(timings)
        self._failed = FailedWorkers(self._roster, self._outbox)
        self._liveness = LivenessMonitor(self._roster, timings)
        self._lineage = LineageState(highest_number)
        self._formation = Formation(job_uid, self._roster, self._lineage, self._outbox, timings)
        self._boundary = StepBoundary(timings)
        self._want: Want | None = None
        self._running: RunningGeneration | None = None
        self._ended_number = 0
        self._shutdown: protocol.Shutdown | None = None
        self._advanced_at = 0.0

    # --- inputs -------------------------------------------------------------------------------------------------------

    def connected(self, connection_id: ConnectionId, hello: Hello, now: float) -> CoordinatorOutput:
        """Process the hello of a new connection."""
        error = rejection(hello, self._job_uid, self._epoch)
        if error is not None:
            self._outbox.send(connection_id, protocol.Error(message=error))
            self._outbox.close(connection_id)
            return self._outbox.drain()
        self._liveness.heard(now)
        claimed = hello.generation.number if hello.generation else 0
        self._lineage.learn_number(max(hello.highest_number, claimed))
        replaced = self._roster.register(connection_id, hello, now)
        if replaced is not None:
            self._outbox.close(replaced)
        agent = self._roster.on(connection_id)
        if agent is not None and self._shutdown is not None:
            self._shut_down(agent, self._shutdown)
            return self._outbox.drain()
        if agent is not None and agent.joined:
            self._welcome(agent, now)
        return self._advance(now)

    def received(self, connection_id: ConnectionId, message: protocol.AgentMessage, now: float) -> CoordinatorOutput:
        """Process a message. Messages on replaced or rejected connections are ignored."""
        agent = self._roster.on(connection_id)
        if agent is None:
            return self._outbox.drain()
        self._liveness.heard(now)
        if not agent.joined:
            agent.heard_at = now
            return self._outbox.drain()
        self._liveness.learn_gap(agent, now)
        agent.heard_at, agent.silent = now, False
        match message:
            case protocol.Heartbeat():
                if self._running is not None and self._running.member(agent.id) is not None:
                    self._running.heartbeat(agent, message, now)
                return self._outbox.drain()
            case protocol.Report():
                self._report(agent, message, now)
                if is_step(message.body):  # the next tick is soon enough
                    return self._outbox.drain()
            case protocol.StoreReady():
                self._formation.store_ready(agent, message)
            case protocol.Leaving():
                agent.leaving = True
                if message.final and agent.final_at is None:
                    agent.final_at = now
            case Hello():
                self._outbox.send_to(agent, protocol.Error(message="hello is the first message only"))
        return self._advance(now)

    def refuse(
        self, connection_id: ConnectionId, pod: tuple[int, int] | None, refusal: Refusal, now: float
    ) -> CoordinatorOutput:
        """Process a message that no correct worker sends: the worker has failed. `pod`: the authenticated one."""
        agent = self._failed.refuse(connection_id, pod, refusal)
        if agent is not None and self._running is not None:
            self._running.refused(agent, refusal.message, now)
        return self._advance(now)

    def disconnected(self, connection_id: ConnectionId, now: float) -> CoordinatorOutput:
        """Process the end of a connection."""
        self._roster.disconnect(connection_id, now)
        return self._advance(now)

    def set_want(self, want: Want, now: float) -> CoordinatorOutput:
        """Set what the plan wants. A suspended job that is wanted again admits agents again."""
        if want.running and self._shutdown is not None and self._shutdown.reason == "suspended":
            self._shutdown = None
        if self._want is not None and want.running and not self._want.running:
            self._formation.resumed(now)
        self._want = want
        self._failed.forget(want.pods)
        return self._advance(now)

    def tick(self, now: float) -> CoordinatorOutput:
        """Process the passage of time."""
        return self._advance(now)

    def end(self, reason: ShutdownReason, message: str, now: float) -> CoordinatorOutput:
        """Shut down every agent, also those that connect later: they kill their ranks and exit."""
        self._shutdown = protocol.Shutdown(reason=reason, message=message)
        self._running = None
        self._formation.abandon()
        for agent in self._roster.agents:
            self._shut_down(agent, self._shutdown)
        return self._outbox.drain()

    def next_deadline(self) -> float | None:
        """Time of the next `tick` without further input; None: no tick is needed."""
        if self._want is None or self._shutdown is not None or not self._roster.agents:
            return None
        running = self._running
        alert = self._formation.pending is not None or (running is not None and self._liveness.unresolved(running))
        due = [agent.ack_due for agent in self._roster.joined if agent.ack_due is not None]
        return min([*due, self._advanced_at + (self._timings.alert_tick if alert else self._timings.tick)])

    def view(self) -> CoordinatorView:
        """Return the current state."""
        running, want = self._running, self._want
        runs = want is not None and want.running and not self._lineage.over
        changing = running is not None and (
            running.command is not None or any(agent.leaving for agent in self._known_members(running))
        )
        pending = self._formation.pending is not None
        return CoordinatorView(
            highest_number=self._lineage.highest,
            current=running.generation if running else None,
            forming=pending or changing or (runs and running is None and self._shutdown is None),
            holding=running.held is not None if running else want is not None and not want.running,
            agents=tuple(agent.view(running.generation if running else None) for agent in self._roster.joined),
            pids=dict(running.pids) if running else {},
            finished=self._lineage.finished,
            fatal=self._lineage.fatal,
        )

    # --- consequences of the state ------------------------------------------------------------------------------------

    def _advance(self, now: float) -> CoordinatorOutput:
        want = self._want
        self._advanced_at = now
        if want is None or self._shutdown is not None:
            return self._outbox.drain()
        self._formation.started(now)
        self._failed.dismiss(want.processes)
        self._admit(want, now)
        self._end_by_fault(want, now)
        self._end_at_boundary(want, now)
        self._request_profile(want)
        self._form(want, now)
        self._announce_and_dissolve()
        for agent in self._roster.joined:
            if agent.ack_due is not None and now >= agent.ack_due:
                agent.ack_due = None
                self._outbox.send_to(agent, protocol.Acked(seq=agent.acked_seq))
        return self._outbox.drain()

    def _admit(self, want: Want, now: float) -> None:
        admissions = self._roster.admit(want.pods, now)
        for agent, why in admissions.removed:
            if agent.connection is not None:
                self._outbox.send_to(agent, protocol.Shutdown(reason="superseded", message=why))
                self._outbox.close(agent.connection)
        for agent in admissions.joined:
            self._welcome(agent, now)

    def _end_by_fault(self, want: Want, now: float) -> None:
        running = self._running
        if running is None or self._lineage.finished is not None:
            return
        verdict = self._liveness.verdict(running, want, now)
        if verdict is None:
            return
        agent = self._roster.find(verdict.member.agent_id) if verdict.member else None
        if agent is not None and verdict.cause == "WorkerSilent":
            agent.silent = True
        self._end(running, verdict, now)

    def _end_at_boundary(self, want: Want, now: float) -> None:
        running = self._running
        if running is None or self._lineage.finished is not None:
            return
        members = tuple(self._roster.find(member.agent_id) for member in running.generation.members)
        fit = tuple(
            agent for agent in self._roster.joined if not agent.leaving and (agent.available or agent in members)
        )
        action = self._boundary.decide(running, members, fit, want, now)
        if action.end is not None:
            agent = next((agent for agent in members if agent is not None and agent.leaving), None)
            member = running.member(agent.id) if agent is not None and action.end == "WorkerLeft" else None
            self._end(running, GenerationVerdict(action.end, now, member, action.message), now)
        elif action.command is not None:
            self._command(running, action.command)

    def _request_profile(self, want: Want) -> None:
        """Send an open profile request once to each generation."""
        running, request = self._running, want.profile
        if running is None or request is None or not running.stepped or running.profile == request.id:
            return
        running.profile = request.id
        command = protocol.Command(
            id=request.id, generation=running.number, action="profile", steps=request.steps, rank=request.rank
        )
        self._command(running, command)

    def _form(self, want: Want, now: float) -> None:
        idle = self._running is None and want.running and not self._lineage.over
        generation = self._formation.advance(want, now, idle=idle)
        if generation is not None:
            self._running = RunningGeneration(generation, since=now)
            self._outbox.publish(GenerationAnnounced(now, generation))

    def _announce_and_dissolve(self) -> None:
        """Bring every agent to the current generation if it is a member, else to none."""
        running, pending = self._running, self._formation.pending
        for agent in self._roster.joined:
            if agent.connection is None:
                continue
            if running is not None and running.member(agent.id) is not None:
                if agent.runs != running.number:
                    agent.runs = running.number
                    self._outbox.send_to(agent, protocol.Formed(generation=running.generation))
            elif agent.runs != 0 and self._lineage.finished is None:
                if pending is not None and not pending.retried and agent.id in pending.members:
                    continue  # the next generation arrives within a round trip and ends the old ranks itself
                reason = self._formation.gap.reason
                self._outbox.send_to(agent, protocol.Dissolved(number=agent.runs, reason=reason))
                agent.runs = 0

    # --- single events ------------------------------------------------------------------------------------------------

    def _welcome(self, agent: Agent, now: float) -> None:
        self._outbox.send_to(agent, protocol.Joined(acked_seq=agent.acked_seq))
        agent.ack_due = None
        self._formation.repeat_host_request(agent)
        running, claim = self._running, agent.claim
        if running is None:
            # A generation below the highest number ended before that one was formed.
            if self._formation.adoptable and claim is not None and agent.claimed_number == self._lineage.highest:
                self._adopt(agent, claim, now)
            return
        match compare_claim(agent, running, tuple(other for other in self._roster.joined if other is not agent)):
            case "agrees":
                running.reconnected(agent, now)
            case "is newer":
                self._adopt(agent, claim or running.generation, now)
            case "disagrees":
                running.verdict = GenerationVerdict("Disagreement", now, None, "agents run different generations")
            case "lost its ranks":
                agent.rankless_at = now  # or it missed the announcement, gets it now, and its next heartbeat shows
            case "is behind":
                pass

    def _adopt(self, agent: Agent, claim: Generation, now: float) -> None:
        step = agent.hello.step
        self._running = RunningGeneration(claim, since=now, adopted=True, step=step, stepped=step > 0)
        self._running.reconnected(agent, now)
        self._lineage.adopt(claim, step)
        self._liveness.adopted(agent.hello, now)

    def _report(self, agent: Agent, report: protocol.Report, now: float) -> None:
        if report.seq <= agent.acked_seq:
            agent.ack_due = now
            return
        agent.acked_seq = report.seq
        due = now + self._timings.ack_delay if is_step(report.body) else now
        agent.ack_due = due if agent.ack_due is None else min(agent.ack_due, due)
        running, body = self._running, report.body
        if report.generation in (self._ended_number, running.number if running else 0):
            # Other ranks' collective errors may end the generation before the cause arrives.
            self._lineage.learn_fatal(body)
        reported = Reported(report.time, report.generation, agent.hello.slot, body)
        if running is None or report.generation != running.number or running.member(agent.id) is None:
            if report.generation == self._ended_number and isinstance(body, reports.StepDone):
                self._outbox.publish(reported)
            return
        self._outbox.publish(reported)
        running.report(agent, body, now)
        self._lineage.learn(body)
        if isinstance(body, reports.StepDone):
            self._liveness.learn_step(body.seconds)

    def _end(self, running: RunningGeneration, verdict: GenerationVerdict, now: float) -> None:
        member = verdict.member
        ended = GenerationEnded(
            time=now,
            number=running.number,
            cause=verdict.cause,
            step=running.step,
            fault_time=verdict.fault_time,
            slot=member.slot if member else None,
            node=member.node if member else "",
            message=verdict.message,
        )
        self._outbox.publish(ended)
        self._formation.generation_ended(running.generation, ended.cause, now, fault=not ended.intended)
        self._running, self._ended_number = None, running.number

    def _command(self, running: RunningGeneration, command: protocol.Command) -> None:
        for agent in self._known_members(running):
            self._outbox.send_to(agent, command)

    def _known_members(self, running: RunningGeneration) -> tuple[Agent, ...]:
        found = (self._roster.find(member.agent_id) for member in running.generation.members)
        return tuple(agent for agent in found if agent is not None)

    def _shut_down(self, agent: Agent, shutdown: protocol.Shutdown) -> None:
        agent.dismissed = agent.connected
        self._outbox.send_to(agent, shutdown)
