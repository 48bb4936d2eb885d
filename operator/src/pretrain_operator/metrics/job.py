"""Metrics of one job, from the effects of its projections and from its status."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

from pretrain_api.status.job import Incident, JobStatus
from pretrain_api.status.metrics import Family
from pretrain_api.status.records import STEP_PARTS, StepRecord, parts_of
from pretrain_operator.metrics import families
from pretrain_operator.metrics.goodput import GoodputCounters
from pretrain_operator.metrics.recovery import ResolvedIncidents, phase_seconds
from pretrain_operator.projections.projection import Measure, Measurement

COUNTER_OF: dict[Measure, Family] = {
    "nonfinite_losses": families.NOT_FINITE,
    "loss_spikes": families.SPIKES,
    "rollbacks": families.ROLLBACKS,
    "checkpoint_stall": families.CHECKPOINT_STALL,
    "checkpoint_bytes": families.CHECKPOINT_BYTES,
    "checkpoint_failures": families.CHECKPOINT_FAILURES,
}
COUNTERS = (families.STEPS, families.STEPS_LOST, *COUNTER_OF.values())


class Distribution:
    """Counts of a histogram."""

    def __init__(self, family: Family) -> None:
        self._bounds = family.buckets
        self._counts = [0] * (len(family.buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Yield (upper bound, number of values up to it), the infinite bound last."""
        total = 0
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            total += count
            yield bound, total


Sample = tuple[Family, tuple[str, ...], float | Distribution]
"""Metric, values of its labels after namespace and name, value."""


class JobSeries:
    """Series of one job. Counters start from zero, as in any new process."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._status = JobStatus()
        self._last_step: StepRecord | None = None
        self._goodput = GoodputCounters()
        self._resolved = ResolvedIncidents()
        self._counts: dict[Family, float] = dict.fromkeys(COUNTERS, 0.0)
        self._parts = dict.fromkeys(STEP_PARTS, 0.0)
        self._restarts: Counter[str] = Counter()
        self._recovery = {phase: Distribution(families.RECOVERY) for phase in families.RECOVERY_PHASES}
        self._interruption = Distribution(families.INTERRUPTION)
        self._checkpoint = Distribution(families.CHECKPOINT)

    def began(self, status: JobStatus) -> None:
        """Continue from this status; everything in it was counted when it happened."""
        self._resolved.new(status.incidents)
        self._goodput.began(status, self._clock())
        self._status = status

    def step(self, record: StepRecord) -> None:
        """Count a completed step."""
        self._last_step = record
        self._counts[families.STEPS] += 1
        for part, seconds in parts_of(record).items():
            self._parts[part] += seconds
        if not (math.isfinite(record.loss) and math.isfinite(record.grad_norm)):
            self._counts[families.NOT_FINITE] += 1

    def measured(self, measurements: tuple[Measurement, ...]) -> None:
        """Count measurements."""
        for measurement in measurements:
            if measurement.measure == "restarts":
                self._restarts[measurement.label] += 1
            elif measurement.measure == "checkpoint_seconds":
                self._checkpoint.observe(measurement.value)
            else:
                self._counts[COUNTER_OF[measurement.measure]] += measurement.value

    def reconciled(self, status: JobStatus) -> None:
        """Follow the status of a reconcile."""
        self._status = status
        self._goodput.reconciled(status)
        for incident in self._resolved.new(status.incidents):
            self._count_recovery(incident)

    def samples(self) -> Iterator[Sample]:
        """Yield all metrics of the job whose value is known."""
        yield from self._present()
        yield from self._counters()
        if self._status.generation:  # a histogram is many series: only for jobs that formed a generation
            yield families.CHECKPOINT, (), self._checkpoint
            yield families.INTERRUPTION, (), self._interruption
            for phase, distribution in self._recovery.items():
                yield families.RECOVERY, (phase,), distribution

    def _present(self) -> Iterator[Sample]:
        status = self._status
        for phase in families.PHASES:
            yield families.PHASE, (phase,), float(phase == status.phase)
        states = Counter(worker.state for worker in status.workers)
        for state in families.WORKER_STATES:
            yield families.WORKERS, (state,), states[state]
        for source, loss in status.validation_loss.items():
            yield families.VALIDATION_LOSS, (source,), loss
        for name, value in status.evaluation_metrics.items():
            yield families.EVALUATION, (name,), value
        yield families.STEP, (), status.step
        yield families.TARGET_STEP, (), status.total_steps
        yield families.TOKENS, (), status.tokens
        yield families.GENERATION, (), status.generation
        yield families.FAILURES, (), len(status.bookkeeping.restarts)
        trains = status.phase == "Training"
        record = self._last_step
        known = {
            families.SPEED: status.tokens_per_second if trains else 0.0,
            families.DEVICE_SPEED: status.tokens_per_second_per_device if trains else 0.0,
            families.MFU: status.mfu if trains or status.mfu is None else 0.0,
            families.PARAMETERS: status.parameters,
            families.LOSS: status.loss,
            families.GRADIENT_NORM: record.grad_norm if record is not None else None,
            families.LEARNING_RATE: record.learning_rate if record is not None else None,
            families.GOODPUT_RATIO: status.goodput.ratio if status.goodput is not None else None,
            families.LAST_CHECKPOINT_STEP: status.checkpoints.latest_step,
            families.LAST_CHECKPOINT_TIME: status.checkpoints.latest_time,
        }
        for family, value in known.items():
            if value is not None:
                yield family, (), value

    def _counters(self) -> Iterator[Sample]:
        goodput = self._goodput.seconds(self._clock())
        for state in families.GOODPUT_STATES:
            yield families.GOODPUT, (state,), goodput.get(state, 0.0)
        for cause in families.RESTART_CAUSES:
            yield families.RESTARTS, (cause,), self._restarts[cause]
        for part, seconds in self._parts.items():
            yield families.STEP_PART, (part,), seconds
        for family, count in self._counts.items():
            yield family, (), count

    def _count_recovery(self, incident: Incident) -> None:
        for phase, seconds in phase_seconds(incident).items():
            self._recovery[phase].observe(seconds)
        self._interruption.observe(incident.resumed_seconds or 0.0)
        self._counts[families.STEPS_LOST] += incident.steps_lost or 0
