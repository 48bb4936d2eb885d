"""The coordinator of one job as a pure state machine: who trains together, and when that ends.

Every input changes what is known, then `_advance` looks at all of it and does what follows: lets agents in, adopts what
already runs, ends a generation, forms the next, tells agents. So nothing depends on the order in which news arrive. It
reads no clock and does no I/O; times are unix seconds that never run backwards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pretrain_api.messages import protocol, reports
from pretrain_api.messages.protocol import Generation, Hello
from pretrain_operator.coordinator.formation import Forming, Interval, choose, ready
from pretrain_operator.coordinator.generation_claims import weigh
from pretrain_operator.coordinator.members import Agent, ConnectionId, Roster
from pretrain_operator.coordinator.output import Outbox, Output
from pretrain_operator.coordinator.rank_memory import Memory
from pretrain_operator.coordinator.running_generation import Running
from pretrain_operator.coordinator.settings import Settings
from pretrain_operator.coordinator.step_boundary import Boundary
from pretrain_operator.coordinator.types import CoordinatorView, Want
from pretrain_operator.facts.fact import Announced, Ended, Reported, is_step
from pretrain_operator.liveness.evidence import Attention
from pretrain_operator.liveness.rules import Verdict, judge

ShutdownReason = Literal["succeeded", "failed", "suspended", "superseded", "removed"]


class Coordinator:
    """Forms generations of one job's agents and ends them. Never two at a time; numbers only rise."""

    def __init__(self, job_uid: str, epoch: int, highest_number: int, settings: Settings) -> None:
        self._job_uid = job_uid
        self._epoch = epoch
        self._settings = settings
        self._roster = Roster(settings)
        self._attention = Attention(self._roster, settings)
        self._memory = Memory(highest_number)
        self._want: Want | None = None
        self._running: Running | None = None
        self._forming: Forming | None = None
        self._interval = Interval("Started", 0.0)
        self._boundary = Boundary(settings)
        self._fresh_until: float | None = None
        """A new coordinator waits for agents until then; None: nothing was asked of it yet."""
        self._adoptable = True
        """No generation was formed or ended here: one that agents bring with them is taken over as it runs."""
        self._ended_number = 0
        self._enough_since: float | None = None
        self._shutdown: protocol.Shutdown | None = None
        self._looked_at = 0.0
        """When all of it was last looked at."""
        self._outbox = Outbox(epoch)

    # --- inputs -------------------------------------------------------------------------------------------------------

    def connected(self, connection_id: ConnectionId, hello: Hello, now: float) -> Output:
        """An agent said hello on a new connection."""
        error = self._unusable(hello)
        if error is not None:
            self._outbox.send(connection_id, protocol.Error(message=error))
            self._outbox.close(connection_id)
            return self._outbox.empty()
        self._attention.hear(now)
        self._memory.highest = max(
            self._memory.highest, hello.highest_number, hello.generation.number if hello.generation else 0
        )
        replaced = self._roster.greet(connection_id, hello, now)
        if replaced is not None:
            self._outbox.close(replaced)
        agent = self._roster.on(connection_id)
        if agent is not None and self._shutdown is not None:
            self._dismiss(agent, self._shutdown)
            return self._outbox.empty()
        if agent is not None and agent.joined:
            self._welcome(agent, now)
        return self._advance(now)

    def received(self, connection_id: ConnectionId, message: protocol.AgentMessage, now: float) -> Output:
        """A message came in. Those of connections that were replaced or refused are ignored."""
        agent = self._roster.on(connection_id)
        if agent is None or not agent.joined:
            if agent is not None:
                self._attention.hear(now)
                agent.heard_at = now
            return self._outbox.empty()
        self._attention.hear(now)
        self._attention.learn_gap(agent, now)
        agent.heard_at, agent.silent = now, False
        match message:
            case protocol.Heartbeat():
                if self._running is not None and self._running.member(agent.id) is not None:
                    self._running.beat(agent, message, now)
                return self._outbox.empty()
            case protocol.Report():
                self._report(agent, message, now)
                if is_step(message.body):  # The next look at all of it is soon enough.
                    return self._outbox.empty()
            case protocol.StoreReady():
                forming = self._forming
                if forming is not None and (forming.number, forming.members[0]) == (message.number, agent.id):
                    self._forming = replace(forming, port=message.port)
            case protocol.Leaving():
                agent.leaving = True
                if message.final and agent.final_at is None:
                    agent.final_at = now
            case Hello():
                self._outbox.tell(agent, protocol.Error(message="hello is the first message only"))
        return self._advance(now)

    def disconnected(self, connection_id: ConnectionId, now: float) -> Output:
        """A connection broke or was closed."""
        self._roster.hang_up(connection_id, now)
        return self._advance(now)

    def set_want(self, want: Want, now: float) -> Output:
        """What the plan asks for from now on. A job that was suspended and is wanted again takes agents in again."""
        if want.running and self._shutdown is not None and self._shutdown.reason == "suspended":
            self._shutdown = None
        if self._want is not None and want.running and not self._want.running:
            self._interval = Interval("Resumed", now)
            self._enough_since = None
        self._want = want
        return self._advance(now)

    def tick(self, now: float) -> Output:
        """Time passed."""
        return self._advance(now)

    def end(self, reason: ShutdownReason, message: str, now: float) -> Output:
        """The job is over: every agent, and every one that comes later, is told to kill its ranks and exit."""
        self._shutdown = protocol.Shutdown(reason=reason, message=message)
        self._running, self._forming, self._adoptable = None, None, False
        for agent in self._roster.agents:
            self._dismiss(agent, self._shutdown)
        return self._outbox.empty()

    def next_deadline(self) -> float | None:
        """When `tick` is due if nothing else comes; None: not before another input."""
        if self._want is None or self._shutdown is not None or not self._roster.agents:
            return None
        running = self._running
        alert = self._forming is not None or (running is not None and self._attention.uneasy(running))
        due = [agent.ack_due for agent in self._roster.joined if agent.ack_due is not None]
        return min([*due, self._looked_at + (self._settings.alert_tick if alert else self._settings.tick)])

    def view(self) -> CoordinatorView:
        """The state at this moment."""
        running, want = self._running, self._want
        runs = want is not None and want.running and not self._memory.over
        changing = running is not None and (running.order is not None or any(a.leaving for a in self._members(running)))
        return CoordinatorView(
            highest_number=self._memory.highest,
            current=running.generation if running else None,
            forming=self._forming is not None or changing or (runs and running is None and self._shutdown is None),
            holding=running.held is not None if running else want is not None and not want.running,
            agents=tuple(agent.view(running.generation if running else None) for agent in self._roster.joined),
            pids=dict(running.pids) if running else {},
            finished=self._memory.finished,
            fatal=self._memory.fatal,
        )

    # --- what follows from what is known ------------------------------------------------------------------------------

    def _advance(self, now: float) -> Output:
        want = self._want
        self._looked_at = now
        if want is None or self._shutdown is not None:
            return self._outbox.empty()
        if self._fresh_until is None:
            self._fresh_until = now + self._settings.fresh_wait
        self._admit(want, now)
        self._end_by_fault(want, now)
        self._change_at_a_boundary(want, now)
        self._ask_for_profile(want)
        self._form(want, now)
        self._announce_and_dissolve()
        for agent in self._roster.joined:
            if agent.ack_due is not None and now >= agent.ack_due:
                self._acknowledge(agent)
        return self._outbox.empty()

    def _admit(self, want: Want, now: float) -> None:
        admissions = self._roster.admit(want.pods, now)
        for agent, why in admissions.refused:
            if agent.connection is not None:
                self._outbox.tell(agent, protocol.Shutdown(reason="superseded", message=why))
                self._outbox.close(agent.connection)
        for agent in admissions.joined:
            self._welcome(agent, now)

    def _end_by_fault(self, want: Want, now: float) -> None:
        running = self._running
        if running is None or self._memory.finished is not None:
            return
        verdict = judge(self._attention.scene(running, want, now), self._settings)
        if verdict is None:
            return
        agent = self._roster.find(verdict.member.agent_id) if verdict.member else None
        if agent is not None and verdict.cause == "WorkerSilent":
            agent.silent = True
        self._end(running, verdict, now)

    def _change_at_a_boundary(self, want: Want, now: float) -> None:
        running = self._running
        if running is None or self._memory.finished is not None:
            return
        members = tuple(self._roster.find(member.agent_id) for member in running.generation.members)
        fit = tuple(
            agent for agent in self._roster.joined if not agent.leaving and (agent.available or agent in members)
        )
        step = self._boundary.decide(running, members, fit, want, now)
        if step.end is not None:
            agent = next((agent for agent in members if agent is not None and agent.leaving), None)
            member = running.member(agent.id) if agent is not None and step.end == "WorkerLeft" else None
            self._end(running, Verdict(step.end, now, member, step.message), now)
        elif step.command is not None:
            for agent in self._members(running):
                self._outbox.tell(agent, step.command)

    def _ask_for_profile(self, want: Want) -> None:
        """Each generation is asked once, until the request is answered."""
        running, request = self._running, want.profile
        if running is None or request is None or not running.stepped or running.profile == request.id:
            return
        running.profile = request.id
        command = protocol.Command(
            id=request.id, generation=running.number, action="profile", steps=request.steps, rank=request.rank
        )
        for agent in self._members(running):
            self._outbox.tell(agent, command)

    def _form(self, want: Want, now: float) -> None:
        available = tuple(agent for agent in self._roster.joined if agent.available and self._recent(agent, now))
        chosen = choose(available, want, self._interval.survivors)
        enough = bool(chosen) and len(chosen) >= want.min
        if not enough:
            self._enough_since = None
        elif self._enough_since is None:
            self._enough_since = now
        if self._running is not None or self._memory.over or not want.running:
            self._forming = None
            return
        failed = self._forming
        if failed is not None:
            if not self._start_over(failed, available, want, now):
                return
            self._forming = None
            chosen = choose(available, want, self._interval.survivors)
        if self._enough_since is None or self._agents_may_still_come(want, now):
            return
        if ready(chosen, want, self._interval, self._enough_since, now, self._settings):
            number = self._memory.next_number()
            members = tuple(agent.id for agent in chosen)
            self._forming = Forming(number, members, now, again=failed is not None)
            self._outbox.tell(chosen[0], protocol.HostStore(number=number))

    def _start_over(self, forming: Forming, available: tuple[Agent, ...], want: Want, now: float) -> bool:
        """Announce what is formed if its store listens. True: it came to nothing."""
        fit = {agent.id for agent in available if agent.hello.slot not in want.remove_slots}
        if not fit.issuperset(forming.members) or not want.min <= len(forming.members) <= want.replicas:
            return True
        if forming.port is not None:
            self._announce(forming, forming.port, now)
            return False
        late = now - forming.asked_at >= self._settings.store_timeout
        host = self._roster.find(forming.members[0])
        if late and host is not None:
            host.failed_hosts += 1
        return late

    def _recent(self, agent: Agent, now: float) -> bool:
        return now - agent.heard_at <= self._settings.silence_after_starting

    def _agents_may_still_come(self, want: Want, now: float) -> bool:
        """A new coordinator does not form what would destroy a generation that it has not heard of yet."""
        if not self._adoptable or self._fresh_until is None or now >= self._fresh_until:
            return False
        return not want.pods.issubset(agent.pod for agent in self._roster.joined if agent.connected)

    def _announce_and_dissolve(self) -> None:
        """Every agent runs the current generation if it is a member, else none."""
        running, forming = self._running, self._forming
        for agent in self._roster.joined:
            if agent.connection is None:
                continue
            if running is not None and running.member(agent.id) is not None:
                if agent.runs != running.number:
                    agent.runs = running.number
                    self._outbox.tell(agent, protocol.Formed(generation=running.generation))
            elif agent.runs != 0 and self._memory.finished is None:
                if forming is not None and not forming.again and agent.id in forming.members:
                    continue  # The next generation comes within a round trip and ends the old ranks itself.
                self._outbox.tell(agent, protocol.Dissolved(number=agent.runs, reason=self._interval.reason))
                agent.runs = 0

    # --- single events ------------------------------------------------------------------------------------------------

    def _welcome(self, agent: Agent, now: float) -> None:
        self._outbox.tell(agent, protocol.Joined(acked_seq=agent.acked_seq))
        agent.ack_due = None
        running, claim, forming = self._running, agent.claim, self._forming
        if forming is not None and agent.id == forming.members[0] and forming.port is None:
            # What it was asked, or its answer, may be lost with the connection before.
            self._outbox.tell(agent, protocol.HostStore(number=forming.number))
        if running is None:
            # One below the highest number ended before that was formed, whoever missed it.
            if self._adoptable and claim is not None and agent.claimed_number == self._memory.highest:
                self._adopt(agent, claim, now)
            return
        match weigh(agent, running, tuple(other for other in self._roster.joined if other is not agent)):
            case "agrees":
                running.reconnected(agent, now)
            case "is newer":
                self._adopt(agent, claim or running.generation, now)
            case "disagrees":
                running.verdict = Verdict("Disagreement", now, None, "agents run different generations")
            case "lost its ranks":
                agent.rankless_at = now  # Or it was never told, and is now: its next heartbeat shows.
            case "is behind":
                pass

    def _adopt(self, agent: Agent, claim: Generation, now: float) -> None:
        step = agent.hello.step
        self._running = Running(claim, since=now, adopted=True, step=step, stepped=step > 0)
        self._running.reconnected(agent, now)
        self._memory.adopt(claim, step)
        self._attention.meet(agent.hello, now)

    def _report(self, agent: Agent, report: protocol.Report, now: float) -> None:
        if report.seq <= agent.acked_seq:
            agent.ack_due = now
            return
        agent.acked_seq = report.seq
        due = now + self._settings.ack_delay if is_step(report.body) else now
        agent.ack_due = due if agent.ack_due is None else min(agent.ack_due, due)
        running, body = self._running, report.body
        if report.generation in (self._ended_number, running.number if running else 0):
            # Other ranks' collective errors may have ended the generation just before the reason for them comes.
            self._memory.condemn(body)
        if running is None or report.generation != running.number or running.member(agent.id) is None:
            if report.generation == self._ended_number and isinstance(body, reports.StepDone):
                self._outbox.note(Reported(report.time, report.generation, agent.hello.slot, body))
            return
        self._outbox.note(Reported(report.time, report.generation, agent.hello.slot, body))
        running.take(agent, body, now)
        self._memory.learn(body)
        if isinstance(body, reports.StepDone):
            self._attention.pace.learn_step(body.seconds)

    def _announce(self, forming: Forming, port: int, now: float) -> None:
        agents = [agent for agent_id in forming.members if (agent := self._roster.find(agent_id)) is not None]
        generation = Generation(
            number=forming.number,
            job_uid=self._job_uid,
            members=tuple(agent.as_member(rank) for rank, agent in enumerate(agents)),
            store_host=agents[0].hello.host,
            store_port=port,
            reason=self._interval.reason,
            rejected=self._memory.rejected,
            may_take_over=not self._memory.owned,
        )
        for agent in agents:
            agent.failed_hosts = 0
        self._running, self._forming, self._adoptable = Running(generation, since=now), None, False
        self._outbox.note(Announced(now, generation))

    def _end(self, running: Running, verdict: Verdict, now: float) -> None:
        member = verdict.member
        ended = Ended(
            time=now,
            number=running.number,
            cause=verdict.cause,
            step=running.step,
            fault_time=verdict.fault_time,
            slot=member.slot if member else None,
            node=member.node if member else "",
            message=verdict.message,
        )
        self._outbox.note(ended)
        survivors = tuple(member.agent_id for member in running.generation.members)
        self._interval = Interval(ended.cause, now, survivors, fault=not ended.intended)
        self._running, self._adoptable, self._ended_number = None, False, running.number
        self._enough_since = None

    # --- small things -------------------------------------------------------------------------------------------------

    def _unusable(self, hello: Hello) -> str | None:
        if hello.version != protocol.PROTOCOL_VERSION:
            return (
                f"protocol version {hello.version} is not spoken here, only {protocol.PROTOCOL_VERSION}: use one image"
            )
        if hello.job_uid != self._job_uid:
            return f"job {hello.job_uid} is not coordinated here, only {self._job_uid}"
        if hello.highest_epoch > self._epoch:
            return f"epoch {self._epoch} is over, since {hello.highest_epoch} was seen: connect to the newer operator"
        return None

    def _members(self, running: Running) -> tuple[Agent, ...]:
        found = (self._roster.find(member.agent_id) for member in running.generation.members)
        return tuple(agent for agent in found if agent is not None)

    def _dismiss(self, agent: Agent, shutdown: protocol.Shutdown) -> None:
        agent.dismissed = agent.connected
        self._outbox.tell(agent, shutdown)

    def _acknowledge(self, agent: Agent) -> None:
        agent.ack_due = None
        self._outbox.tell(agent, protocol.Acked(seq=agent.acked_seq))
