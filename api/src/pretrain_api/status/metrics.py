"""What a Prometheus metric is, said once: for the process that shows it, its documentation, dashboards and alerts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """A metric by Prometheus' conventions: base units, counters end in `_total`, ratios go from 0 to 1."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    unit: str = ""
    """In words: `seconds`, `bytes`, `steps`; empty for a plain number."""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, without the infinite one."""

    @property
    def declaration(self) -> tuple[str, str, tuple[str, ...]]:
        """The first arguments of a metric of the Prometheus client."""
        return self.name, self.meaning, self.labels

    @property
    def series(self) -> tuple[str, ...]:
        """The names that it has in Prometheus."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)
