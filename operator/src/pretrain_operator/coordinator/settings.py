"""The times by which the coordinator judges. All in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain_api.messages.protocol import HEARTBEAT_SECONDS


@dataclass(frozen=True)
class Settings:
    """What is not learned from the job itself. The defaults suit a cluster and a laptop alike."""

    tick: float = 0.25
    """The longest time between two looks at a calm job."""
    alert_tick: float = 0.02
    """The same while something is undecided: a broken connection, a store asked for, a collective error."""
    ack_delay: float = 0.25
    """Acknowledgements of frequent reports are gathered for so long."""

    closed_after: float = 2 * HEARTBEAT_SECONDS
    """A member whose connection broke is lost after so long, or one step if that is longer, without a step; agents
    tell of quick steps as often as their hearts beat."""
    closed_after_unreported: float = 3 * HEARTBEAT_SECONDS
    """The same when rank 0's agent is away: then heartbeats alone tell of steps."""
    closed_after_starting: float = 1.5
    """The same before the first step, when no steps can prove life and a restart of the start is costly."""
    silence_after: float = max(1.0, 4 * HEARTBEAT_SECONDS)
    """A connected member that says nothing for so long may be frozen; more where heartbeats came with larger gaps."""
    silence_at_most: float = 5.0
    """The learned allowance for silence never grows beyond this."""
    silence_after_starting: float = 3.0
    """Silence before the first step: machines are busy with imports, heartbeats come late."""
    standstill_after: float = 1.0
    """Steps stand still after so long, or three steps if that is longer."""
    collective_wait: float = 0.05
    """A collective error waits so long for the report or the broken connection that explains it."""
    reconnect_grace: float = 2.5
    """After nobody was heard, agents come back one by one, with back-off: nobody is called lost for so long."""
    reconnect_grace_still: float = 2.0
    """The same after somebody else coordinated, where steps stand still since before: agents try at least every second,
    and no longer are those who live waited for than it takes to come back."""

    hang_at_least: float = 60.0
    """Without a step for so long, or 20 steps if that is longer, all ranks hang."""
    hang_apart_from_steps: float = 900.0
    """The same before the first step of a generation and while it evaluates: loading and compiling take their time, and
    so do evaluations of the user's own."""

    store_timeout: float = 5.0
    """The agent that is to host the store has so long to say that it listens."""
    fresh_wait: float = 3.0
    """A new coordinator lets agents reconnect for so long before it forms a generation without some of the pods."""
    pod_lag: float = 10.0
    """An agent may be known before its pod: it is kept waiting for so long."""
    settle: float = 0.1
    """Agents that join within so short a time are taken together."""

    hold_seconds: float = 30.0
    """How long ranks hold at a step boundary for a change of members."""
    suspend_hold_seconds: float = 3600.0
    """How long they hold when the job is to stop."""
    command_timeout: float = 120.0
    """A commanded checkpoint that is not in force by then has failed."""
    command_backoff: float = 5.0
    """After a change that came to nothing; doubled each time."""
    command_backoff_at_most: float = 300.0
    idle_hold: float = 1.0
    """Ranks that hold for a change that nobody wants any more are set going again after so long."""
