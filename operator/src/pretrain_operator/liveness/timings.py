"""The time constants of failure detection, and the durations that a coordinator learns from the job.

Every timeout by which coordinator or `decide` declares something lost stands here, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.messages.protocol import HEARTBEAT_SECONDS
from pretrain_operator.facts.pace import StepPace


@dataclass(frozen=True)
class Timings:
    """Time constants in seconds. The defaults suit a cluster and a laptop alike."""

    # Coordinator loop.
    tick: float = 0.25
    """Maximum interval between two evaluations of a healthy job."""
    alert_tick: float = 0.02
    """Maximum interval while a disconnect, a store request or a collective error is unresolved."""
    ack_delay: float = 0.25
    """Batching delay of acknowledgements for step reports."""

    # A member of the current generation whose connection broke.
    closed_after: float = 2 * HEARTBEAT_SECONDS
    """Disconnect plus standstill before a member is lost; at least one step, since survivors may complete the step
    under way. Two heartbeats, because agents report steps faster than a heartbeat once per heartbeat."""
    closed_after_unreported: float = 3 * HEARTBEAT_SECONDS
    """`closed_after` while rank 0's agent is disconnected: then only heartbeats report steps."""
    closed_after_starting: float = 1.5
    """`closed_after` before the first step, when no step can prove life and a restarted start is expensive."""

    # A connected member of the current generation that is silent.
    silence_after: float = max(1.0, 4 * HEARTBEAT_SECONDS)
    """Silence of a connected member before it may be frozen. Grows with the largest heartbeat gap observed."""
    silence_at_most: float = 5.0
    """Upper bound of the learned silence allowance."""
    silence_after_starting: float = 3.0
    """Silence allowance before the first step: imports occupy the machine and delay heartbeats."""
    standstill_after: float = 1.0
    """Time without a step before steps count as stalled; at least three steps."""

    # Ranks of the current generation.
    collective_wait: float = 0.05
    """Delay of a collective error's verdict, in which its cause (a report, a disconnect) usually arrives."""
    hang_at_least: float = 60.0
    """Time without a step before all ranks hang; at least 20 steps."""
    hang_apart_from_steps: float = 900.0
    """`hang_at_least` before a generation's first step and during evaluations: loading, compilation and custom
    evaluations take long."""

    # Silence that is the observer's own fault.
    reconnect_grace: float = 2.5
    """After total silence no absent agent is lost for this long: agents reconnect one by one with backoff."""
    reconnect_grace_still: float = 2.0
    """`reconnect_grace` after a change of coordinator while steps stall: agents retry at least every second, and
    whoever is missing most likely caused the stall."""
    heard_within: float = 2.0
    """With no agent heard for this long the silence is the operator's own and proves nothing about a worker."""
    late_after: float = 5.0
    """An operator that wakes up this late was stopped or starved: silence during that time proves nothing."""

    # Formation of a generation.
    store_timeout: float = 5.0
    """Time for the hosting agent to report that its store listens."""
    fresh_wait: float = 3.0
    """Time for agents to reconnect to a new coordinator before it forms a generation without some of the pods."""
    pod_lag: float = 10.0
    """Time for a pod to appear in the cluster's watch after its agent connected."""
    settle: float = 0.1
    """Agents that join within this time are admitted to one generation."""

    # Planned changes at a step boundary.
    hold_seconds: float = 30.0
    """Hold of the ranks for a change of members."""
    suspend_hold_seconds: float = 3600.0
    """Hold of the ranks while the job stops."""
    command_timeout: float = 120.0
    """Time for a commanded checkpoint to be committed."""
    command_backoff: float = 5.0
    """Backoff after a failed change; doubles each time."""
    command_backoff_at_most: float = 300.0
    idle_hold: float = 1.0
    """Hold after which ranks resume if the change is no longer wanted."""

    # Replacement of workers whose pod still exists.
    lost_agent: float = 5.0
    """Silence of a worker outside the generation before its pod is replaced."""
    agent_return: float = 10.0
    """`lost_agent` for an agent that a new operator has not heard yet: agents reconnect one by one with backoff."""
    alone: float = 30.0
    """Silence of a job's only worker before its pod is replaced: no other agent can prove whose fault it is."""
    start: float = 120.0
    """Time from a container's start to its agent's hello; image pulls excluded."""
    unplaced: float = 150.0
    """Time before an unschedulable pod with unknown excluded nodes is recreated once."""
    node_excluded: float = 120.0
    """Exclusion of a silent node. By then the cluster has marked a dead node as not ready."""
    linger: float = 5.0
    """Time for agents to exit by themselves at the end of the job; a worker that never joined is deleted at once."""


TIMINGS = Timings()
"""The table in use wherever no test passes another one."""


class LearnedTimings:
    """Durations learned from the job: the step time and the gaps between an agent's messages."""

    def __init__(self) -> None:
        self._pace = StepPace()
        self._gap = 0.0

    @property
    def step_seconds(self) -> float:
        """Median duration of the last steps; 0 before the first one."""
        return self._pace.median_seconds

    @property
    def gap(self) -> float:
        """Largest gap between two messages of a healthy agent, with slow decay."""
        return self._gap

    def learn_step(self, seconds: float) -> None:
        """Record the duration of a step."""
        self._pace = self._pace.lasted(seconds)

    def seed_step(self, seconds: float) -> None:
        """Use a step time reported in a hello until a step is observed."""
        if not self._pace.durations and seconds > 0:
            self.learn_step(seconds)

    def learn_gap(self, seconds: float, at_most: float) -> None:
        """Record a gap between two messages. A gap above `at_most` is an outage and is ignored."""
        if seconds <= at_most:
            self._gap = max(seconds, self._gap * 0.995)
