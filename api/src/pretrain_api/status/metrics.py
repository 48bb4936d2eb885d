"""Declaration of a Prometheus metric, shared by exposition, documentation, dashboards and alerts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Metric by Prometheus' conventions: base units, counters end in `_total`, ratios go from 0 to 1."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    unit: str = ""
    """Unit in words: `seconds`, `bytes`, `steps`; empty for a plain number."""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, without infinity."""

    @property
    def declaration(self) -> tuple[str, str, tuple[str, ...]]:
        """First arguments of a Prometheus client's metric."""
        return self.name, self.meaning, self.labels

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its series in Prometheus."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)
