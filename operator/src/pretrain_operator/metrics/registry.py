"""Registry of the operator's Prometheus metrics: of each job and of the process itself."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from typing import get_args

import structlog
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from pretrain_api.status.job import JobStatus
from pretrain_api.status.metrics import Family
from pretrain_operator.coordinator.message_parser import RefusalReason
from pretrain_operator.job.ports import JobListener
from pretrain_operator.metrics import families
from pretrain_operator.metrics.job import Distribution, JobSeries, Sample

CONTENT_TYPE = CONTENT_TYPE_LATEST

log = structlog.get_logger()


class OperatorMetrics:
    """Metrics of one operator process. Call all but `exposition` in the event loop's thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._jobs: dict[tuple[str, str], JobSeries] = {}
        self.registry = registry = CollectorRegistry()
        registry.register(_JobCollector(self._jobs))
        ProcessCollector(namespace="pretrain_operator", registry=registry)
        self._reconcile = Histogram(
            *families.RECONCILE.declaration, buckets=families.RECONCILE.buckets, registry=registry
        )
        self._api_calls = Counter(*families.API_CALLS.declaration, registry=registry)
        self._refused = Counter(*families.AGENTS_REFUSED.declaration, registry=registry)
        self._messages_refused = Counter(*families.MESSAGES_REFUSED.declaration, registry=registry)
        for reason in get_args(RefusalReason):
            self._messages_refused.labels(reason)  # from 0, so that `increase` sees the first one
        self._leader = Gauge(*families.LEADER.declaration, registry=registry)
        self._agents = Gauge(*families.AGENTS.declaration, registry=registry)
        self._queue_depth = Gauge(*families.QUEUE_DEPTH.declaration, registry=registry)
        self._queue_oldest = Gauge(*families.QUEUE_OLDEST.declaration, registry=registry)

    def job(self, namespace: str, name: str) -> JobListener:
        """Return the listener of a job's service. A second call continues the same counters."""
        series = self._jobs.setdefault((namespace, name), JobSeries(self._clock))

        def reconciled(status: JobStatus, seconds: float) -> None:
            self._reconcile.observe(seconds)
            series.reconciled(status)

        return JobListener(began=series.began, step=series.step, measured=series.measured, reconciled=reconciled)

    def forget(self, namespace: str, name: str) -> None:
        """Drop the series of a deleted job."""
        self._jobs.pop((namespace, name), None)

    def api_call(self, verb: str, code: str) -> None:
        """Count a call of the API server by its answer."""
        self._api_calls.labels(verb, code).inc()

    def agent_refused(self, reason: str) -> None:
        """Count a refused agent by one of the few reasons that the code knows."""
        self._refused.labels(reason).inc()

    def message_refused(self, reason: str) -> None:
        """Count a refused message by one of the few reasons that the code knows."""
        self._messages_refused.labels(reason).inc()

    def leading(self, acts: bool) -> None:
        """Record whether this replica is the leader."""
        self._leader.set(acts)

    def watch_agents(self, connected: Callable[[], float]) -> None:
        """Set the function that returns the number of connected agents; scrapes call it from any thread."""
        self._agents.set_function(connected)

    def watch_queue(self, depth: Callable[[], float], oldest_seconds: Callable[[], float]) -> None:
        """Set the functions that return length and oldest age of the queue; scrapes call them from any thread."""
        self._queue_depth.set_function(depth)
        self._queue_oldest.set_function(oldest_seconds)

    def exposition(self) -> bytes:
        """Render all metrics as text of `CONTENT_TYPE`. With many jobs this is slow: call it in a thread."""
        return generate_latest(self.registry)


class _JobCollector(Collector):
    def __init__(self, jobs: dict[tuple[str, str], JobSeries]) -> None:
        self._jobs = jobs

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics of all jobs, which may be added and removed in the event loop meanwhile."""
        found = {family: _empty(family) for family in families.JOB_FAMILIES}
        for job, series in tuple(self._jobs.items()):
            for family, labels, value in _valid_samples(series):
                metric = found[family]
                if isinstance(value, Distribution):
                    assert isinstance(metric, HistogramMetricFamily)
                    buckets = [
                        ("+Inf" if math.isinf(le) else str(float(le)), count) for le, count in value.cumulative()
                    ]
                    metric.add_metric((*job, *labels), buckets, value.sum)
                else:
                    assert not isinstance(metric, HistogramMetricFamily)
                    metric.add_metric((*job, *labels), value)
        return found.values()


def _valid_samples(series: JobSeries) -> list[Sample]:
    """Return the samples of a job that can be exposed. A bad value must not hide the metrics of other jobs."""
    valid: list[Sample] = []
    try:
        for family, labels, value in series.samples():
            with contextlib.suppress(ArithmeticError, TypeError, ValueError):
                shown = value if isinstance(value, Distribution) else float(value)
                valid.append((family, tuple(label.encode(errors="replace").decode() for label in labels), shown))
    except (ArithmeticError, TypeError, ValueError) as error:
        log.warning("metrics of a job are incomplete", error=str(error))
    return valid


def _empty(family: Family) -> GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily:
    made = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "histogram": HistogramMetricFamily}
    return made[family.kind](family.name, family.meaning, labels=family.labels)
