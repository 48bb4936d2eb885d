"""Nodes that new workers had better not be put on: what counts against a node, and for how long."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable, Iterator

from pretrain_api.messages.trainer_config import ExitCode
from pretrain_api.spec import job as spec
from pretrain_api.status.job import NodeFailure, Suspect
from pretrain_operator.cluster import Pod
from pretrain_operator.facts.fact import Ended
from pretrain_operator.liveness.timings import TIMINGS

MAX_SUSPECTS = 50
MAX_FAILURES = 20
"""Kept in the status, the newest ones."""
SILENT = "WorkerSilent"
CRASHES = ("Error", "Killed", "OOMKilled", "StartError", "ContainerCannotRun")
"""Reasons of pods that ended by themselves and not because somebody wanted their place."""
BLAMELESS = (ExitCode.INVALID, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes that say nothing of the node: bad input, and an end on request."""

Suspects = tuple[Suspect, ...]


def crashes(pods: Iterable[Pod]) -> Iterator[tuple[str, NodeFailure]]:
    """The workers that crashed or ran out of memory, each with its node. The same pod gives the same failure again."""
    for pod in pods:
        ended_by_itself = pod.phase == "Failed" and not pod.deleting and pod.reason in CRASHES
        if ended_by_itself and pod.exit_code not in BLAMELESS:
            yield pod.node, NodeFailure(time=pod.finished_at or pod.created_at, cause=pod.reason)


class Blame:
    """What is held against nodes, gathered as it becomes known."""

    def __init__(self, suspects: Suspects) -> None:
        self.suspects = suspects
        self._judged = suspects

    def nodes(
        self, crashed: Iterable[tuple[str, NodeFailure]], silent: Iterable[str], now: float, rule: spec.Suspects
    ) -> None:
        """Workers crashed there, or nothing is heard any more from there. Time alone changes nothing."""
        suspects = self.suspects
        for node, failure in crashed:
            suspects = with_failure(suspects, node, failure)
        for node in sorted(silent):
            suspects = with_silence(suspects, node, now)
        if suspects != self._judged:
            self.suspects = self._judged = judged(suspects, rule, now)

    def ended(self, fact: Ended, *, killed: bool) -> None:
        """A generation ended by a worker that fell silent, or whose ranks were `killed` by something else than the
        job."""
        if fact.cause == SILENT:
            silence = NodeFailure(time=fact.time, cause=SILENT)
            self.suspects = with_failure(with_silence(self.suspects, fact.node, fact.time), fact.node, silence)
        elif fact.cause == "RankFailed" and killed:
            self.suspects = with_failure(self.suspects, fact.node, NodeFailure(time=fact.time, cause="Killed"))

    def quarantine(self, node: str, time: float) -> None:
        """A rule of the job says that the node is to be avoided."""
        self.suspects = with_quarantine(self.suspects, node, time)


def with_failure(suspects: Suspects, node: str, failure: NodeFailure) -> Suspects:
    """One more failure on a node; one that is known already changes nothing."""
    before = _find(suspects, node)
    if failure in before.failures:
        return suspects
    failures = sorted((*before.failures, failure), key=lambda known: known.time)[-MAX_FAILURES:]
    return _put(suspects, before.model_copy(update={"failures": tuple(failures)}))


def with_silence(suspects: Suspects, node: str, time: float) -> Suspects:
    """Nothing on the node answers. Said again and again it counts from the first time, until that is over."""
    before = _find(suspects, node)
    if before.silent_at is not None and time - before.silent_at < TIMINGS.node_excluded:
        return suspects
    return _put(suspects, before.model_copy(update={"silent_at": time}))


def with_quarantine(suspects: Suspects, node: str, time: float) -> Suspects:
    """A rule of the job says that the node is to be avoided."""
    return _put(suspects, _find(suspects, node).model_copy(update={"quarantined_at": time}))


def judged(suspects: Suspects, rule: spec.Suspects, now: float) -> Suspects:
    """What is not too old, and which nodes are to be avoided."""
    recent = [_recent(suspect, now - rule.window.total_seconds(), now) for suspect in suspects]
    recent = [suspect for suspect in recent if suspect.failures or suspect.silent_at or suspect.quarantined_at]
    return tuple(
        suspect.model_copy(
            update={"avoided": suspect.quarantined_at is not None or _blamed(suspect, recent) >= rule.failures}
        )
        for suspect in recent
    )


def _blamed(suspect: Suspect, suspects: Iterable[Suspect]) -> int:
    """Failures that count against the node. A crash that other nodes see as often is the program's own."""
    others = [Counter(known.cause for known in other.failures) for other in suspects if other is not suspect]
    own = Counter(failure.cause for failure in suspect.failures)
    return sum(
        count
        for cause, count in own.items()
        if cause == SILENT or count > max((other[cause] for other in others), default=0)
    )


def _recent(suspect: Suspect, since: float, now: float) -> Suspect:
    silent, quarantined = suspect.silent_at, suspect.quarantined_at
    return suspect.model_copy(
        update={
            "failures": tuple(failure for failure in suspect.failures if failure.time > since),
            "silent_at": silent if silent is not None and now - silent < TIMINGS.node_excluded else None,
            "quarantined_at": quarantined if quarantined is not None and quarantined > since else None,
        }
    )


def _find(suspects: Suspects, node: str) -> Suspect:
    return next((suspect for suspect in suspects if suspect.node == node), Suspect(node=node))


def _put(suspects: Suspects, changed: Suspect) -> Suspects:
    if not changed.node:
        return suspects  # Of a worker without a known node.
    others = tuple(suspect for suspect in suspects if suspect.node != changed.node)
    return (*others, changed)[-MAX_SUSPECTS:]
