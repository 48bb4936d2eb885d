"""Figures from Prometheus' text, and the line through points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


def samples(text: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    """Labels and value of each sample of this name. Only its lines are parsed: there may be megabytes of others."""
    wanted = "".join(f"{line}\n" for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    for family in text_string_to_metric_families(wanted):
        for sample in family.samples:
            yield sample.labels, sample.value


@dataclass(frozen=True)
class Histogram:
    """Counts by upper bound, as cumulative as Prometheus has them."""

    buckets: tuple[tuple[float, float], ...]
    sum: float

    @classmethod
    def of(cls, text: str, name: str) -> Histogram:
        """One without labels."""
        buckets = sorted((float(labels["le"]), value) for labels, value in samples(text, f"{name}_bucket"))
        return cls(tuple(buckets), sum(value for _, value in samples(text, f"{name}_sum")))

    @property
    def count(self) -> float:
        """Of all values."""
        return self.buckets[-1][1] if self.buckets else 0.0

    def since(self, before: Histogram) -> Histogram:
        """What came after `before`."""
        earlier = dict(before.buckets)
        counts = tuple((bound, value - earlier.get(bound, 0.0)) for bound, value in self.buckets)
        return Histogram(counts, self.sum - before.sum)

    def quantile(self, share: float) -> float:
        """As Prometheus' histogram_quantile: linear within a bucket."""
        rank, low, below = share * self.count, 0.0, 0.0
        for bound, count in self.buckets:
            if count >= rank and count > below:
                return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
            low, below = bound, count
        return math.nan


@dataclass(frozen=True)
class Line:
    """The line of least squares through points."""

    slope: float
    intercept: float
    residual: float
    """The largest distance of a point from it."""

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> Line:
        """`xs` must not all be the same."""
        slope, intercept = statistics.linear_regression(xs, ys)
        return cls(slope, intercept, max(abs(y - slope * x - intercept) for x, y in zip(xs, ys, strict=True)))
