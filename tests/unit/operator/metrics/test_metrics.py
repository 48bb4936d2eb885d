"""The metrics: what a job's service hears becomes series, each thing counted once, and gone with the job."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pretrain_agent.network import metrics_server as exposition
from pretrain_agent.network.metrics_server import WorkerMetrics
from pretrain_api.messages.reports import Diverged, MemoryUse, Progress, Restored, Saved, SaveFailed
from pretrain_api.status.job import (
    Bookkeeping,
    CheckpointSummary,
    GenerationSummary,
    Goodput,
    Incident,
    JobStatus,
    WorkerStatus,
)
from pretrain_api.status.metrics import Family
from pretrain_api.status.records import StepRecord
from pretrain_operator.facts.fact import Fact
from pretrain_operator.job.ports import JobListener
from pretrain_operator.job.service import JobService
from pretrain_operator.metrics import families
from pretrain_operator.metrics.goodput import GoodputCounters
from pretrain_operator.metrics.recovery import phase_seconds
from pretrain_operator.metrics.registry import OperatorMetrics
from support.operator.ledger import Book
from support.operator.world import (
    NOON,
    FakeChannel,
    FakeCluster,
    World,
    a_generation,
    a_job,
    a_restore,
    a_rolled_back,
    a_save,
    a_step,
    an_end,
    announced,
    said,
)

ACCELERATOR = MemoryUse(bytes=2048, peak_bytes=4096, reserved_bytes=8192, alloc_retries=3)
FAMILIES = (*families.JOB_FAMILIES, *families.OPERATOR_FAMILIES, *exposition.FAMILIES)
A_STEP = StepRecord(
    step=1,
    loss=2.0,
    grad_norm=0.5,
    learning_rate=1e-3,
    tokens=9,
    tokens_per_second=8.0,
    generation=1,
    workers=2,
    time=NOON,
)


@dataclass
class Shown:
    """What a scrape says."""

    metrics: OperatorMetrics

    def series(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        text = self.metrics.exposition().decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        """The value of a metric of job ml/gpt2."""
        return self.series().get((name, frozenset({"namespace": "ml", "name": "gpt2", **labels}.items())))


@dataclass
class Clock:
    now: float = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> OperatorMetrics:
    return OperatorMetrics(clock)


@pytest.fixture
def shown(metrics: OperatorMetrics) -> Shown:
    return Shown(metrics)


@pytest.fixture
def listener(metrics: OperatorMetrics) -> JobListener:
    listener = metrics.job("ml", "gpt2")
    listener.began(JobStatus())
    return listener


def count(listener: JobListener, *facts: Fact, status: JobStatus | None = None) -> None:
    """Pass on what a ledger that continues from the status measures of the facts."""
    book = Book(status)
    book.tell(*facts)
    listener.measured(tuple(book.measurements))


def an_incident(**fields: Any) -> Incident:
    ends = {
        "detected_seconds": 0.25,
        "reformed_seconds": 0.5,
        "restarted_seconds": 1.5,
        "restored_seconds": 3.5,
        "resumed_seconds": 4.0,
    }
    return Incident.model_validate({"cause": "WorkerLost", "worker": 1, "step": 7, "time": NOON} | ends | fields)


def spent(state: Any = "training", until: float = NOON, **seconds: float) -> dict[str, Any]:
    """Fields of a status with these seconds of goodput."""
    return {
        "goodput": Goodput.model_validate({"ratio": 0.5, "seconds": seconds}),
        "bookkeeping": Bookkeeping(state=state, counted_until=until),
    }


# --- what a job is ---------------------------------------------------------------------------------------------------


def test_a_job_is_in_one_phase(listener: JobListener, shown: Shown) -> None:
    listener.reconciled(JobStatus(phase="Recovering"), 0.1)

    phases = {phase: shown("pretrain_job_phase", phase=phase) for phase in families.PHASES}
    assert phases == {phase: float(phase == "Recovering") for phase in families.PHASES}


def test_progress_and_workers_are_those_of_the_status(listener: JobListener, shown: Shown) -> None:
    workers = tuple(WorkerStatus(slot=n, attempt=0, state="Training" if n else "Lost") for n in range(3))
    status = JobStatus(
        phase="Training", step=5, total_steps=9, tokens=50, loss=2.5, tokens_per_second=10.0, generation=3,
        workers=workers, parameters=7, validation_loss={"web": 3.5}, bookkeeping=Bookkeeping(restarts=(1.0, 2.0)),
        evaluation_metrics={"endings/right": 0.75},
        checkpoints=CheckpointSummary(latest_step=4, latest_time=NOON - 60),
    )  # fmt: skip
    listener.step(A_STEP)
    listener.reconciled(status, 0.1)

    assert shown("pretrain_job_step") == 5
    assert shown("pretrain_job_target_step") == 9
    assert shown("pretrain_job_tokens") == 50
    assert shown("pretrain_job_loss") == 2.5
    assert shown("pretrain_job_tokens_per_second") == 10
    assert shown("pretrain_job_generation") == 3
    assert shown("pretrain_job_parameters") == 7
    assert shown("pretrain_job_validation_loss", source="web") == 3.5
    assert shown("pretrain_job_evaluation_metric", metric="endings/right") == 0.75
    assert shown("pretrain_job_workers", state="Training") == 2
    assert shown("pretrain_job_workers", state="Lost") == 1
    assert shown("pretrain_job_workers", state="Joined") == 0
    assert shown("pretrain_job_failures_since_progress") == 2
    assert shown("pretrain_job_last_checkpoint_step") == 4
    assert shown("pretrain_job_last_checkpoint_timestamp_seconds") == NOON - 60
    assert shown("pretrain_job_gradient_norm") == 0.5
    assert shown("pretrain_job_learning_rate") == 1e-3


def test_what_is_not_known_has_no_series(listener: JobListener, shown: Shown) -> None:
    listener.reconciled(JobStatus(phase="Pending"), 0.1)

    for unknown in ("loss", "parameters", "gradient_norm", "goodput_ratio", "last_checkpoint_timestamp_seconds"):
        assert shown(f"pretrain_job_{unknown}") is None


def test_a_job_that_does_not_train_has_no_speed(listener: JobListener, shown: Shown) -> None:
    listener.reconciled(JobStatus(phase="Recovering", tokens_per_second=10.0), 0.1)

    assert shown("pretrain_job_tokens_per_second") == 0


def test_the_series_of_a_job_go_when_it_is_deleted(
    metrics: OperatorMetrics, listener: JobListener, shown: Shown
) -> None:
    metrics.job("ml", "other").reconciled(JobStatus(generation=1), 0.1)
    listener.reconciled(JobStatus(generation=1), 0.1)

    metrics.forget("ml", "gpt2")
    listener.reconciled(JobStatus(generation=2), 0.1)  # A service that ends says its last words.

    jobs = {dict(labels).get("name") for name, labels in shown.series() if name.startswith("pretrain_job_")}
    assert jobs == {"other"}


def test_a_job_of_the_same_name_begins_anew(metrics: OperatorMetrics, listener: JobListener, shown: Shown) -> None:
    listener.step(A_STEP)
    metrics.forget("ml", "gpt2")

    metrics.job("ml", "gpt2").reconciled(JobStatus(), 0.1)

    assert shown("pretrain_job_steps_total") == 0


# --- what is counted -------------------------------------------------------------------------------------------------


def test_restarts_are_counted_by_cause_and_those_on_purpose_are_none(listener: JobListener, shown: Shown) -> None:
    count(listener, an_end(1, 1), an_end(2, 2, "Hang"), an_end(3, 3, "Hang"), an_end(4, 4, "Resized"))

    restarts = {cause: shown("pretrain_job_restarts_total", cause=cause) for cause in families.RESTART_CAUSES}
    assert restarts == {cause: {"WorkerLost": 1.0, "Hang": 2.0}.get(cause, 0.0) for cause in families.RESTART_CAUSES}
    assert shown("pretrain_job_restarts_total", cause="Resized") is None


def test_checkpoints_are_counted_once_however_often_they_are_reported(listener: JobListener, shown: Shown) -> None:
    listener.reconciled(JobStatus(generation=1), 0.1)
    saves = said(1, 1, a_save(10)), said(2, 1, a_save(10)), said(3, 1, a_save(20))
    count(listener, *saves, said(3, 1, SaveFailed(step=30, message="full")))

    assert shown("pretrain_job_checkpoint_seconds_count") == 2
    assert shown("pretrain_job_checkpoint_seconds_sum") == 2.0
    assert shown("pretrain_job_checkpoint_seconds_bucket", le="1.0") == 2
    assert shown("pretrain_job_checkpoint_bytes_total") == 2
    assert shown("pretrain_job_checkpoint_stall_seconds_total") == 0.5
    assert shown("pretrain_job_checkpoint_failures_total") == 1


def test_a_checkpoint_that_the_operator_before_knew_is_not_counted_again(listener: JobListener, shown: Shown) -> None:
    status = JobStatus(generation=1, latest_checkpoint=a_save(10).checkpoint)
    listener.began(status)

    count(listener, said(1, 1, a_save(10)), status=status)

    assert shown("pretrain_job_checkpoint_seconds_count") == 0


def test_losses_that_diverge_are_counted_by_what_they_are(listener: JobListener, shown: Shown) -> None:
    not_finite = Diverged(step=7, since=7, cause="LossNotFinite", action="Drop")
    spike = Diverged(step=9, since=8, cause="LossSpike", action="Rollback")

    again = not_finite.model_copy(update={"step": 8})
    count(listener, said(1, 1, not_finite), said(2, 1, again), said(3, 1, spike))

    assert shown("pretrain_job_nonfinite_losses_total") == 2
    assert shown("pretrain_job_loss_spikes_total") == 1


def test_a_rollback_is_counted_once_for_all_ranks_and_operators(listener: JobListener, shown: Shown) -> None:
    status = JobStatus(
        generation=2,
        generations=(GenerationSummary(number=2, workers=1, started_at_step=3, reason="RolledBack", formed_as=1),),
    )
    listener.began(status)
    second, third = (a_rolled_back(number) for number in (2, 3))

    count(listener, said(1, 1, second), said(2, 1, third), said(2, 1, third), status=status)

    assert shown("pretrain_job_rollbacks_total") == 1


def test_the_time_of_the_last_checkpoint_outlives_the_operator_and_a_restore() -> None:
    book = Book()
    book.tell(announced(0, a_generation(1, (0, 0))), said(1, 1, a_save(10)))

    later = book.again()
    later.tell(announced(50, a_generation(2, (0, 0))), said(60, 2, a_restore(10)))
    assert later.status.checkpoints.latest_time == NOON + 1

    # The time of another checkpoint is unknown.
    later.tell(announced(61, a_generation(3, (0, 0))), said(61, 3, a_restore(5)))
    assert later.status.checkpoints.latest_time is None


# --- recoveries ------------------------------------------------------------------------------------------------------


def test_the_phases_of_a_recovery_are_differences(listener: JobListener, shown: Shown) -> None:
    listener.reconciled(JobStatus(generation=2, incidents=(an_incident(steps_lost=3),)), 0.1)

    seconds = {phase: shown("pretrain_job_recovery_seconds_sum", phase=phase) for phase in families.RECOVERY_PHASES}
    assert seconds == {"detect": 0.25, "reform": 0.25, "restart": 1.0, "restore": 2.0, "first_step": 0.5}
    assert shown("pretrain_job_interruption_seconds_sum") == 4.0
    assert shown("pretrain_job_interruption_seconds_count") == 1
    assert shown("pretrain_job_lost_steps_total") == 3


POINTS = ("detected_seconds", "reformed_seconds", "restarted_seconds", "restored_seconds")


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e4) | st.none(), min_size=4, max_size=4), st.floats(0, 1e4))
def test_the_phases_add_up_to_the_interruption(points: list[float | None], resumed: float) -> None:
    known = {name: None if point is None else min(point, resumed) for name, point in zip(POINTS, points, strict=True)}
    seconds = phase_seconds(an_incident(**known, resumed_seconds=resumed))

    assert sum(seconds.values()) == pytest.approx(resumed)
    assert all(value >= 0 for value in seconds.values())


def test_an_incident_counts_when_it_is_overcome_and_only_then(listener: JobListener, shown: Shown) -> None:
    open_ = an_incident(resumed_seconds=None)
    listener.reconciled(JobStatus(generation=2, incidents=(open_,)), 0.1)
    assert shown("pretrain_job_interruption_seconds_count") == 0

    for _ in range(3):
        listener.reconciled(JobStatus(generation=2, incidents=(an_incident(),)), 0.1)
    assert shown("pretrain_job_interruption_seconds_count") == 1


def test_incidents_of_the_operator_before_do_not_count_again(metrics: OperatorMetrics, shown: Shown) -> None:
    old, open_ = an_incident(), an_incident(time=NOON + 9, resumed_seconds=None)
    listener = metrics.job("ml", "gpt2")
    listener.began(JobStatus(generation=2, incidents=(old, open_)))

    listener.reconciled(JobStatus(generation=2, incidents=(old, an_incident(time=NOON + 9))), 0.1)

    assert shown("pretrain_job_interruption_seconds_count") == 1


def test_a_service_that_starts_again_in_the_same_process_counts_nothing_twice(
    metrics: OperatorMetrics, listener: JobListener, shown: Shown
) -> None:
    listener.reconciled(JobStatus(generation=2, incidents=(an_incident(),)), 0.1)

    again = metrics.job("ml", "gpt2")
    again.began(JobStatus(generation=2, incidents=(an_incident(resumed_seconds=None),)))  # Its end was not written.
    again.reconciled(JobStatus(generation=2, incidents=(an_incident(),)), 0.1)

    assert shown("pretrain_job_interruption_seconds_count") == 1


# --- goodput ---------------------------------------------------------------------------------------------------------


def test_goodput_counts_from_zero_in_each_operator(metrics: OperatorMetrics, shown: Shown) -> None:
    listener = metrics.job("ml", "gpt2")
    listener.began(JobStatus(**spent(training=1000.0)))
    assert shown("pretrain_job_goodput_seconds_total", state="training") == 0

    listener.reconciled(JobStatus(phase="Training", **spent(training=1012.5, saving=1.0)), 0.1)

    assert shown("pretrain_job_goodput_seconds_total", state="training") == 12.5
    assert shown("pretrain_job_goodput_seconds_total", state="saving") == 1
    assert shown("pretrain_job_goodput_seconds_total", state="queued") == 0
    assert shown("pretrain_job_goodput_ratio") == 0.5


def test_a_recovery_that_does_not_end_shows_as_it_goes_on(clock: Clock, listener: JobListener, shown: Shown) -> None:
    listener.reconciled(JobStatus(phase="Recovering", **spent("recovering", training=5.0)), 0.1)

    clock.now += 30

    assert shown("pretrain_job_goodput_seconds_total", state="recovering") == 30
    assert shown("pretrain_job_goodput_seconds_total", state="training") == 5


def test_the_time_in_which_no_operator_ran_is_not_guessed(clock: Clock, metrics: OperatorMetrics, shown: Shown) -> None:
    clock.now += 3600
    metrics.job("ml", "gpt2").began(JobStatus(phase="Recovering", **spent("recovering", recovering=1.0)))
    clock.now += 2

    assert shown("pretrain_job_goodput_seconds_total", state="recovering") == 2


def test_a_job_that_is_done_spends_no_more_time(clock: Clock, listener: JobListener, shown: Shown) -> None:
    listener.reconciled(JobStatus(phase="Failed", **spent("recovering", recovering=1.0)), 0.1)

    clock.now += 3600

    assert shown("pretrain_job_goodput_seconds_total", state="recovering") == 1


@settings(deadline=None)
@given(st.data())
def test_counters_of_goodput_never_fall(data: st.DataObject) -> None:
    counters, now = GoodputCounters(), NOON
    before: dict[Any, float] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        now += data.draw(st.floats(0, 100))
        state = data.draw(st.sampled_from(families.GOODPUT_STATES))
        seconds = data.draw(st.dictionaries(st.sampled_from(families.GOODPUT_STATES), st.floats(0, 1e5), max_size=3))
        status = JobStatus(phase="Training", **spent(state, now - data.draw(st.floats(0, 50)), **seconds))
        if data.draw(st.booleans()):
            counters.began(status, now)
        else:
            counters.reconciled(status)
        shown = counters.seconds(now)
        assert all(shown[state] >= value for state, value in before.items())
        before = shown


# --- with the real service -------------------------------------------------------------------------------------------


async def test_a_service_tells_its_witness_what_it_goes_on_from(metrics: OperatorMetrics, shown: Shown) -> None:
    world = World(a_job(2))
    await _serve(world, metrics.job("ml", "gpt2"))
    world.kill(1)
    await _serve(world, metrics.job("ml", "gpt2"))
    assert shown("pretrain_job_interruption_seconds_count") == 1
    assert shown("pretrain_job_restarts_total", cause="WorkerLost") == 1

    later = OperatorMetrics(world.clock)  # Another process takes over.
    await _serve(world, later.job("ml", "gpt2"))

    assert Shown(later)("pretrain_job_interruption_seconds_count") == 0
    assert Shown(later)("pretrain_job_step") == world.step


async def _serve(world: World, listener: JobListener) -> None:
    """A service's life until nothing is left to do."""
    channel = FakeChannel(world)
    service = JobService(FakeCluster(world), channel, listener, world.clock)
    for _ in range(100):
        world.now += 1
        round_ = await service.decide()
        if service.is_due(round_):
            await service.act(round_)
        elif not channel.go_on():
            return
    raise AssertionError("it does not come to rest")


# --- the operator and the workers themselves -------------------------------------------------------------------------


def test_the_operator_tells_of_itself(metrics: OperatorMetrics, shown: Shown) -> None:
    metrics.job("ml", "gpt2").reconciled(JobStatus(), 0.03)
    metrics.api_call("patch", "200")
    metrics.agent_refused("TokenExpired")
    metrics.message_refused("OutOfBounds")
    metrics.leading(True)
    metrics.watch_agents(lambda: 12)
    metrics.watch_queue(lambda: 3, lambda: 0.5)

    series = {(name, tuple(sorted(labels))): value for (name, labels), value in shown.series().items()}
    assert series["pretrain_operator_reconcile_seconds_count", ()] == 1
    assert series["pretrain_operator_api_calls_total", (("code", "200"), ("verb", "patch"))] == 1
    assert series["pretrain_operator_agents_refused_total", (("reason", "TokenExpired"),)] == 1
    assert series["pretrain_operator_messages_refused_total", (("reason", "OutOfBounds"),)] == 1
    assert series["pretrain_operator_leader", ()] == 1
    assert series["pretrain_operator_agents_connected", ()] == 12
    assert series["pretrain_operator_queue_depth", ()] == 3
    assert series["pretrain_operator_queue_oldest_seconds", ()] == 0.5
    assert series["pretrain_operator_process_start_time_seconds", ()] > 1e9

    metrics.leading(False)
    assert shown.series()["pretrain_operator_leader", frozenset()] == 0


@pytest.mark.parametrize(
    "bad",
    [{"tokens": 10**400}, {"loss": 10**400}, {"validation_loss": {"\ud800": 1.0}}, {"validation_loss": {"a": None}},
     {"step": "many"}],
    ids=["tokens", "loss", "label", "none", "text"],
)  # fmt: skip
def test_a_bad_value_of_one_job_hides_no_metric_of_another(
    metrics: OperatorMetrics, shown: Shown, bad: dict[str, Any]
) -> None:
    metrics.job("ml", "bad").reconciled(JobStatus(generation=1).model_copy(update=bad), 0.1)
    metrics.job("ml", "good").reconciled(JobStatus(generation=1, step=7), 0.1)

    series = shown.series()

    assert series["pretrain_job_step", frozenset({("namespace", "ml"), ("name", "good")})] == 7
    assert series["pretrain_job_generation", frozenset({("namespace", "ml"), ("name", "good")})] == 1


def _worker_text(metrics: WorkerMetrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_a_worker_tells_of_each_rank_while_it_runs() -> None:
    metrics = WorkerMetrics()
    metrics.rank_started(0, os.getpid())
    metrics.record(0, a_step(3, seconds=0.2).model_copy(update={"data_seconds": 0.05, "loss_contribution": 1.5}))
    metrics.record(1, Progress(step=3, seconds=0.2, data_seconds=0.1, loss_contribution=1.25, memory=ACCELERATOR))
    metrics.record(
        0, Saved(step=3, checkpoint="c", bytes=1, stall_seconds=0, seconds=1, stages={"copy": 0.1, "upload": 0.9})
    )
    metrics.record(0, Restored(step=0, seconds={"verify": 0.5}))

    text = _worker_text(metrics)
    for line in (
        "pretrain_worker_step 3.0",
        "pretrain_worker_step_seconds_count 1.0",
        'pretrain_worker_data_wait_seconds_total{local_rank="0"} 0.05',
        'pretrain_worker_data_wait_seconds_total{local_rank="1"} 0.1',
        'pretrain_worker_loss_contribution{local_rank="1"} 1.25',
        'pretrain_worker_device_memory_bytes{kind="used",local_rank="1"} 2048.0',
        'pretrain_worker_device_memory_bytes{kind="peak",local_rank="1"} 4096.0',
        'pretrain_worker_device_memory_bytes{kind="reserved",local_rank="1"} 8192.0',
        'pretrain_worker_alloc_retries_total{local_rank="1"} 3.0',
        'pretrain_worker_step_part_seconds_total{local_rank="0",part="data"} 0.05',
        'pretrain_worker_step_part_seconds_total{local_rank="1",part="data"} 0.1',
        'pretrain_worker_save_seconds_sum{stage="upload"} 0.9',
        'pretrain_worker_restore_seconds_sum{stage="verify"} 0.5',
    ):
        assert line in text
    for name in ("pretrain_worker_memory_bytes{", "pretrain_worker_memory_peak_bytes{"):
        (memory,) = (line for line in text.splitlines() if line.startswith(name))
        assert float(memory.split()[-1]) > 2**20

    metrics.ranks_gone()
    text = _worker_text(metrics)
    assert "pretrain_worker_loss_contribution{" not in text
    assert "pretrain_worker_memory_bytes{" not in text
    assert "pretrain_worker_step 3.0" in text


def test_the_memory_of_a_process_that_is_gone_is_none() -> None:
    assert exposition.resident_bytes(2**22 + 1) == 0


# --- conventions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_follow_the_conventions(family: Family) -> None:
    assert family.name.startswith(("pretrain_job_", "pretrain_operator_", "pretrain_worker_"))
    assert (family.kind == "counter") == family.name.endswith("_total")
    assert (family.kind == "histogram") == bool(family.buckets)
    assert not {"pod", "uid", "step", "generation", "attempt"} & set(family.labels)
    if family.unit in ("seconds", "bytes"):
        assert family.unit in family.name
    if family.name.startswith("pretrain_job_"):
        assert family.labels[:2] == ("namespace", "name")


def test_what_is_shown_is_what_is_listed(metrics: OperatorMetrics, shown: Shown) -> None:
    busy = JobStatus(
        generation=1, phase="Training", loss=1.0, parameters=1, validation_loss={"a": 1.0}, latest_checkpoint="c",
        evaluation_metrics={"b": 1.0},
        checkpoints=CheckpointSummary(latest_step=1, latest_time=1.0), tokens_per_second=1.0, mfu=0.4,
        tokens_per_second_per_device=0.5, **spent(training=1.0),
    )  # fmt: skip
    listener = metrics.job("ml", "gpt2")
    listener.step(A_STEP)
    listener.reconciled(busy, 0.1)
    metrics.api_call("get", "200")
    metrics.agent_refused("NoToken")
    metrics.message_refused("OutOfBounds")

    labels: dict[str, set[str]] = {}
    for name, of in shown.series():
        if not name.endswith("_created"):
            labels.setdefault(name, set()).update(dict(of))
    listed = {
        name: set(family.labels) | ({"le"} if name.endswith("_bucket") else set())
        for family in (*families.JOB_FAMILIES, *families.OPERATOR_FAMILIES)
        for name in family.series
    }
    assert labels == listed


def test_the_series_of_one_job_are_few(metrics: OperatorMetrics, listener: JobListener, shown: Shown) -> None:
    listener.reconciled(JobStatus(generation=1), 0.1)

    assert sum(name.startswith("pretrain_job_") for name, _ in shown.series()) < 150
