"""Mistakes that a user mends: `InvalidJob`, which carries one `Problem` for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One mistake: where it is, what is wrong, and what is allowed or what to do."""

    path: str
    """As users write it: `spec.training.data.sources[1].uri`; empty: the whole file."""
    message: str
    line: int | None = None
    location: Location = ()
    origin: str = ""
    """The `--set` option that it comes from; empty: the file."""

    def __str__(self) -> str:
        where = f" ({self.origin})" if self.origin else ""
        return f"{self.path}{where}: {self.message}" if self.path or where else self.message


class InvalidJob(Exception):
    """The job cannot be run as it is: the user mends it. Exit code 2."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        """The job file's name."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.lines()))

    def lines(self) -> tuple[str, ...]:
        """One line for each mistake, beginning with the file and the line in it, where known."""
        return tuple(
            f"{self.source}:{problem.line}: {problem}" if problem.line else f"{self.source}: {problem}"
            for problem in self.problems
        )


def path_text(location: Location) -> str:
    """`("spec", "sources", 1, "uri")` -> `spec.sources[1].uri`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")
