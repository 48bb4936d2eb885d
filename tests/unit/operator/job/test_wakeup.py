"""Scheduling of reconciles."""

from __future__ import annotations

import asyncio

import pytest

from pretrain_operator.job.wakeup import ROUND_SECONDS, ActionRunner, ReconcileTrigger, cluster_retries


async def test_many_causes_are_one_awakening() -> None:
    trigger = ReconcileTrigger()
    for _ in range(10):
        trigger.soon()
        trigger.now()

    await trigger.wait(20)
    again = asyncio.create_task(trigger.wait(None))
    await asyncio.sleep(0)

    assert not again.done()
    again.cancel()


async def test_what_agents_say_starts_rounds_seldom_and_what_matters_at_once() -> None:
    trigger, loop = ReconcileTrigger(), asyncio.get_running_loop()
    trigger.soon()
    await trigger.wait(20)
    began = loop.time()

    trigger.now()
    await trigger.wait(20)
    urgent = loop.time()
    trigger.soon()
    await trigger.wait(20)

    assert urgent - began < loop.time() - urgent
    assert loop.time() - urgent >= ROUND_SECONDS * 0.9


async def test_what_can_wait_starts_no_round_before_its_time_and_delays_none() -> None:
    trigger, loop = ReconcileTrigger(), asyncio.get_running_loop()
    began = loop.time()
    trigger.within(0.5)
    trigger.within(1000.0)
    await trigger.wait(20)
    waited = loop.time() - began
    trigger.within(1000.0)
    trigger.soon()

    async with asyncio.timeout(20):
        await trigger.wait(None)
    assert waited >= 0.5 * 0.9


async def test_a_cause_during_a_round_starts_the_next_one() -> None:
    trigger = ReconcileTrigger()
    trigger.now()
    await trigger.wait(20)
    trigger.now()

    async with asyncio.timeout(20):
        await trigger.wait(None)


def test_delays_grow_with_errors_in_a_row() -> None:
    retries = cluster_retries()
    assert [retries.delay() for _ in range(3)] == [0.1, 0.2, 0.4]
    assert [retries.delay() for _ in range(30)][-1] == 10.0

    retries.succeeded()

    assert retries.delay() == 0.1


async def test_hands_do_one_thing_at_a_time_and_rest_after_a_failure() -> None:
    done, release = asyncio.Event(), asyncio.Event()

    async def work() -> bool:
        await release.wait()
        return False

    runner = ActionRunner(done.set)
    assert runner.backoff() == 0.0
    runner.start(work())
    assert runner.backoff() == float("inf")
    release.set()
    await asyncio.wait_for(done.wait(), 20)

    assert 0.0 < runner.backoff() <= 0.1 + 1e-6, "seconds since 1970 are exact to a microsecond or so"


async def test_a_bug_in_the_work_is_raised() -> None:
    done = asyncio.Event()

    async def work() -> bool:
        raise ZeroDivisionError

    runner = ActionRunner(done.set)
    runner.start(work())
    await asyncio.wait_for(done.wait(), 20)

    with pytest.raises(ZeroDivisionError):
        runner.backoff()
