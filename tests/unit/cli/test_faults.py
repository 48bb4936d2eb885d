"""`--fault`: what is understood, what is refused and how."""

from __future__ import annotations

import pytest

from pretrain_cli.inputs.faults import BadFault, Fault, FaultPlan, parse_fault, plan_faults


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kill:worker=1,step=60", ("kill", "worker", 1, 60)),
        ("kill:rank=0,step=1", ("kill", "rank", 0, 1)),
        ("kill:agent=2,step=5", ("kill", "agent", 2, 5)),
        ("kill:coordinator,step=30", ("kill", "coordinator", None, 30)),
        ("stop:worker=1,step=40", ("stop", "worker", 1, 40)),
        ("term:worker=1,step=40", ("term", "worker", 1, 40)),
        ("remove:worker,step=40", ("remove", "worker", None, 40)),
        ("remove:worker=2,step=40", ("remove", "worker", 2, 40)),
        ("remove:,step=40", ("remove", "worker", None, 40)),
        ("add:,step=7", ("add", "worker", None, 7)),
        ("nan:step=60", ("nan", "data", None, 60)),
        ("nan:data,step=60", ("nan", "data", None, 60)),
        (" kill:worker=1, step=60 ", ("kill", "worker", 1, 60)),
    ],
)
def test_a_fault_is_understood(text: str, expected: tuple[str, str, int | None, int]) -> None:
    fault = parse_fault(text)

    assert (fault.action, fault.target, fault.number, fault.step) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "write ACTION:TARGET=N,step=S, for example kill:worker=1,step=60"),
        ("kill:worker=1", "write ACTION:TARGET=N,step=S"),
        ("explode:worker=1,step=2", "unknown action 'explode'; use one of kill, stop, term, remove, add, nan"),
        ("kill:step=2", "kill needs one of kill:worker, kill:rank, kill:agent, kill:coordinator"),
        ("nan:worker=1,step=2", "nan needs one of nan:data"),
        ("nan:data=1,step=2", "data takes no number; write nan:data,step=S"),
        ("kill:pod=1,step=2", "kill needs one of kill:worker, kill:rank, kill:agent, kill:coordinator"),
        ("stop:rank=1,step=2", "stop needs one of stop:worker"),
        ("kill:,step=2", "kill needs one of"),
        ("kill:worker,step=2", "name the worker, for example kill:worker=1,step=2"),
        ("kill:worker=,step=2", "worker must be a whole number from 0, not ''"),
        ("kill:worker=-1,step=2", "worker must be a whole number from 0, not '-1'"),
        ("kill:worker=x,step=2", "worker must be a whole number from 0, not 'x'"),
        ("kill:worker=1,step=two", "step must be a whole number from 0, not 'two'"),
        ("kill:worker=1,step=0", "step counts completed steps, from 1"),
        ("kill:coordinator=1,step=2", "coordinator takes no number; write kill:coordinator,step=S"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(text: str, message: str) -> None:
    with pytest.raises(BadFault) as refused:
        parse_fault(text)

    assert str(refused.value).startswith(f"--fault {text}: ")
    assert message in str(refused.value)


def faults(*texts: str) -> list[Fault]:
    return [parse_fault(text) for text in texts]


def planned(*texts: str, replicas: int = 3, processes: int = 1, quantum: int = 1) -> FaultPlan:
    return plan_faults(faults(*texts), replicas, processes, total_steps=100, quantum=quantum)


def test_faults_come_in_the_order_of_their_steps() -> None:
    assert [fault.step for fault in planned("kill:worker=1,step=60", "kill:coordinator,step=30").faults] == [30, 60]


def test_adding_and_removing_tells_how_many_workers_are_wanted() -> None:
    plan = planned("remove:worker,step=10", "add:worker,step=20", "add:worker,step=30", "add:worker,step=40")

    assert (plan.fewest, plan.most) == (2, 5)


def test_a_worker_that_is_there_only_later_is_refused_before() -> None:
    with pytest.raises(BadFault, match="there is no worker 3 at that step: use 0 to 2"):
        planned("kill:worker=3,step=10", "add:worker,step=20")

    planned("kill:worker=3,step=30", "add:worker,step=20")


def test_ranks_are_counted_over_all_workers() -> None:
    planned("kill:rank=5,step=10", processes=2)

    with pytest.raises(BadFault, match="there is no rank 6 at that step: use 0 to 5"):
        planned("kill:rank=6,step=10", processes=2)


def test_a_fault_after_the_last_step_is_refused() -> None:
    with pytest.raises(BadFault, match="step must be below 100, the job's last step"):
        planned("kill:worker=1,step=100")


def test_the_last_worker_cannot_be_removed() -> None:
    with pytest.raises(BadFault, match="it would leave no worker"):
        planned("remove:worker,step=10", replicas=1)


def test_workers_come_and_go_in_whole_replicas() -> None:
    assert planned("add:worker,step=10", "add:worker,step=10", replicas=2, quantum=2).most == 4

    with pytest.raises(BadFault, match="multiples of 2 here, not 3: give it 2 times with the same step"):
        planned("add:worker,step=10", "add:worker,step=20", replicas=2, quantum=2)


def test_a_run_without_faults_keeps_its_workers() -> None:
    assert planned() == FaultPlan((), 3, 3)
