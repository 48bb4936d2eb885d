"""What keeps workers from training until somebody mends it, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Obstacle
from pretrain_operator.cluster import Pod
from pretrain_operator.decide.observe import Observed, fewest, missing_slots, wanted_slots

INVALID_SPEC = "InvalidSpec"
SAME_REASON = {"ErrImagePull": "ImagePullBackOff"}
"""The kubelet goes to and fro between the two."""
SHOWN = 5
"""So many workers are named."""
LONGEST = 600
"""Characters of what the cluster says."""
_IMAGE = "set spec.workers.image to one that the nodes can pull, or name imagePullSecrets in spec.workers.template"
_TEMPLATE = "correct spec.workers.template"
REMEDIES = {
    "Unschedulable": "add or free nodes, or ask for less in spec.workers.template",
    "SchedulingGated": "remove the scheduling gate once its condition is met",
    "ImagePullBackOff": _IMAGE,
    "ErrImageNeverPull": _IMAGE,
    "InvalidImageName": _IMAGE,
    "ImageInspectError": _IMAGE,
    "CreateContainerConfigError": "create the secret or config map that it names, or correct the name in the spec",
    "CreateContainerError": _TEMPLATE,
    "RunContainerError": _TEMPLATE,
    "CrashLoopBackOff": "correct the container of spec.workers.template that fails",
}
OTHER_REMEDY = "`kubectl describe pod` says more; it goes on by itself when that is mended"


def obstacles(job: PretrainJob, seen: Observed) -> tuple[Obstacle, ...]:
    """All that is in the way, the most pressing first."""
    found = [*_of_workers(job, seen)]
    if seen.invalid:
        remedy = "correct it; until then the job goes on with the last spec that was in order"
        found.append(Obstacle(reason=INVALID_SPEC, message=f"{_said(seen.invalid)}; {remedy}"))
    return tuple(found)


def what_stops(job: PretrainJob, seen: Observed) -> Obstacle | None:
    """The obstacle for which nobody trains; None: enough workers can, or nothing is in the way."""
    if seen.ranks_wait is not None:
        return seen.ranks_wait
    if seen.view.current is not None:
        return None
    away = {*missing_slots(job, seen.workers), *(pod.slot for pod in _stuck_pods(job, seen))}
    if len(wanted_slots(job)) - len(away) >= fewest(job):
        return None
    return combined(_of_workers(job, seen))


def combined(found: Sequence[Obstacle]) -> Obstacle | None:
    """All of them as one, under the reason of the first; None: there is none."""
    if len(found) <= 1:
        return found[0] if found else None
    return Obstacle(
        reason=found[0].reason,
        message=". ".join([found[0].message, *(f"{other.reason}: {other.message}" for other in found[1:])]),
    )


def _of_workers(job: PretrainJob, seen: Observed) -> tuple[Obstacle, ...]:
    found = [seen.ranks_wait] if seen.ranks_wait is not None else []
    missing = missing_slots(job, seen.workers)
    if seen.refusal is not None and missing:
        waiting = f" ({len(missing)} workers wait)" if len(missing) > 1 else ""
        found.append(Obstacle(reason=seen.refusal.reason, message=_said(seen.refusal.message) + waiting))
    stuck = _stuck_pods(job, seen)
    for reason in dict.fromkeys(_reason(pod) for pod in stuck):
        pods = [pod for pod in stuck if _reason(pod) == reason]
        found.append(_obstacle(reason, [pod.slot for pod in pods], pods[0].message))
    return tuple(found)


def _stuck_pods(job: PretrainJob, seen: Observed) -> list[Pod]:
    """The newest pods of wanted slots that cannot start."""
    newest = {worker.pod.slot: worker.pod for worker in seen.workers}
    wanted = wanted_slots(job)
    return [
        pod
        for slot, pod in newest.items()
        if slot in wanted and pod.phase == "Pending" and pod.reason and not pod.deleting
    ]


def _obstacle(reason: str, slots: Sequence[int], message: str) -> Obstacle:
    said = _said(message) or reason
    return Obstacle(reason=reason, message=f"{_who(slots)}: {said}; {REMEDIES.get(reason, OTHER_REMEDY)}")


def _reason(pod: Pod) -> str:
    return SAME_REASON.get(pod.reason, pod.reason)


def _said(message: str) -> str:
    """What the cluster says, on one line, without what it thinks about preemption, and not too long."""
    line = " ".join(message.split()).partition(" preemption: ")[0].rstrip(" .;")
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _who(slots: Iterable[int]) -> str:
    names = [str(slot) for slot in slots]
    if len(names) == 1:
        return f"worker {names[0]}"
    if len(names) > SHOWN:
        names = [*names[:SHOWN], f"{len(names) - SHOWN} more"]
    return f"workers {', '.join(names[:-1])} and {names[-1]}"
