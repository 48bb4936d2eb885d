"""Figures from Prometheus' text format, and linear regression."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


def samples(text: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    """Iterate over labels and values of a metric. Parses only its lines: the text may have megabytes of others."""
    wanted = "".join(f"{line}\n" for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")))
    for family in text_string_to_metric_families(wanted):
        for sample in family.samples:
            yield sample.labels, sample.value


@dataclass(frozen=True)
class Histogram:
    """Cumulative counts by upper bound, as in Prometheus."""

    buckets: tuple[tuple[float, float], ...]
    sum: float

    @classmethod
    def of(cls, text: str, name: str) -> Histogram:
        """Parse a histogram without labels."""
        buckets = sorted((float(labels["le"]), value) for labels, value in samples(text, f"{name}_bucket"))
        return cls(tuple(buckets), sum(value for _, value in samples(text, f"{name}_sum")))

    @property
    def count(self) -> float:
        """Number of values."""
        return self.buckets[-1][1] if self.buckets else 0.0

    def since(self, before: Histogram) -> Histogram:
        """Return the difference to an earlier histogram."""
        earlier = dict(before.buckets)
        counts = tuple((bound, value - earlier.get(bound, 0.0)) for bound, value in self.buckets)
        return Histogram(counts, self.sum - before.sum)

    def quantile(self, share: float) -> float:
        """Interpolate linearly within a bucket, as Prometheus' histogram_quantile does."""
        rank, low, below = share * self.count, 0.0, 0.0
        for bound, count in self.buckets:
            if count >= rank and count > below:
                return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
            low, below = bound, count
        return math.nan


@dataclass(frozen=True)
class Line:
    """Least-squares line through points."""

    slope: float
    intercept: float
    residual: float
    """Largest distance of a point from the line."""

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> Line:
        """Fit the line; `xs` must not all be equal."""
        slope, intercept = statistics.linear_regression(xs, ys)
        return cls(slope, intercept, max(abs(y - slope * x - intercept) for x, y in zip(xs, ys, strict=True)))
