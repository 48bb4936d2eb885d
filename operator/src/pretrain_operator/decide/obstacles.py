"""Obstacles to training that the user or the cluster must remove, with the remedy for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Obstacle
from pretrain_operator.cluster import Pod
from pretrain_operator.decide.observe import Observed
from pretrain_operator.decide.sizing import min_members, missing_slots, wanted_slots

INVALID_SPEC = "InvalidSpec"
SAME_REASON = {"ErrImagePull": "ImagePullBackOff"}
"""The kubelet alternates between the two."""
MAX_NAMED = 5
"""Workers that a message lists."""
MAX_MESSAGE = 600
"""Characters of a message of the cluster."""
_IMAGE = "set spec.workers.image to one that the nodes can pull, or name imagePullSecrets in spec.workers.template"
_TEMPLATE = "correct spec.workers.template"
REMEDIES = {
    "Unschedulable": "add or free nodes, or ask for less in spec.workers.template",
    "SchedulingGated": "remove the scheduling gate once its condition is met",
    "ImagePullBackOff": _IMAGE,
    "ErrImageNeverPull": _IMAGE,
    "InvalidImageName": _IMAGE,
    "ImageInspectError": _IMAGE,
    "CreateContainerConfigError": "create the secret or config map it names, or correct the name in the spec",
    "CreateContainerError": _TEMPLATE,
    "RunContainerError": _TEMPLATE,
    "CrashLoopBackOff": "correct the container of spec.workers.template that fails",
}
OTHER_REMEDY = "see `kubectl describe pod`; the job resumes by itself once the cause is fixed"


def obstacles(job: PretrainJob, observed: Observed) -> tuple[Obstacle, ...]:
    """Return all obstacles, the most urgent first."""
    found = [*_of_workers(job, observed)]
    if observed.invalid:
        remedy = "correct it; until then the job continues with the last valid spec"
        found.append(Obstacle(reason=INVALID_SPEC, message=f"{_one_line(observed.invalid)}; {remedy}"))
    return tuple(found)


def stopping_obstacle(job: PretrainJob, observed: Observed) -> Obstacle | None:
    """Return the obstacle that stops training; None: enough workers can train, or there is no obstacle."""
    if observed.projected.ranks_wait is not None:
        return observed.projected.ranks_wait
    if observed.view.current is not None:
        return None
    away = {
        *missing_slots(job, observed.pods),
        *(pod.slot for pod in _stuck_pods(job, observed)),
    }
    if len(wanted_slots(job)) - len(away) >= min_members(job):
        return None
    return combined(_of_workers(job, observed))


def combined(found: Sequence[Obstacle]) -> Obstacle | None:
    """Combine obstacles into one with the reason of the first; None: there are none."""
    if len(found) <= 1:
        return found[0] if found else None
    return Obstacle(
        reason=found[0].reason,
        message=". ".join([found[0].message, *(f"{other.reason}: {other.message}" for other in found[1:])]),
    )


def _of_workers(job: PretrainJob, observed: Observed) -> tuple[Obstacle, ...]:
    found = [observed.projected.ranks_wait] if observed.projected.ranks_wait is not None else []
    missing = missing_slots(job, observed.pods)
    if observed.refusal is not None and missing:
        waiting = f" ({len(missing)} workers wait)" if len(missing) > 1 else ""
        found.append(Obstacle(reason=observed.refusal.reason, message=_one_line(observed.refusal.message) + waiting))
    stuck = _stuck_pods(job, observed)
    for reason in dict.fromkeys(_reason(pod) for pod in stuck):
        pods = [pod for pod in stuck if _reason(pod) == reason]
        found.append(_obstacle(reason, [pod.slot for pod in pods], pods[0].message))
    return tuple(found)


def _stuck_pods(job: PretrainJob, observed: Observed) -> list[Pod]:
    """Return the newest pods of wanted slots that cannot start."""
    newest = {worker.pod.slot: worker.pod for worker in observed.workers}
    wanted = wanted_slots(job)
    return [
        pod
        for slot, pod in newest.items()
        if slot in wanted and pod.phase == "Pending" and pod.reason and not pod.deleting
    ]


def _obstacle(reason: str, slots: Sequence[int], message: str) -> Obstacle:
    said = _one_line(message) or reason
    return Obstacle(reason=reason, message=f"{_worker_names(slots)}: {said}; {REMEDIES.get(reason, OTHER_REMEDY)}")


def _reason(pod: Pod) -> str:
    return SAME_REASON.get(pod.reason, pod.reason)


def _one_line(message: str) -> str:
    """Return a message of the cluster on one line, without its preemption details, truncated."""
    line = " ".join(message.split()).partition(" preemption: ")[0].rstrip(" .;")
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"


def _worker_names(slots: Iterable[int]) -> str:
    names = [str(slot) for slot in slots]
    if len(names) == 1:
        return f"worker {names[0]}"
    if len(names) > MAX_NAMED:
        names = [*names[:MAX_NAMED], f"{len(names) - MAX_NAMED} more"]
    return f"workers {', '.join(names[:-1])} and {names[-1]}"
