"""Mistakes in a user's job: `InvalidJob`, with one `Problem` for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """Mistake in a job: its field, what is wrong, and the fix."""

    path: str
    """Field as users write it: `spec.training.data.sources[1].uri`; empty: the whole file."""
    message: str
    line: int | None = None
    location: Location = ()
    origin: str = ""
    """`--set` option that contains the mistake; empty: the file."""

    def __str__(self) -> str:
        where = f" ({self.origin})" if self.origin else ""
        return f"{self.path}{where}: {self.message}" if self.path or where else self.message


class InvalidJob(Exception):
    """The job is invalid and the user must fix it. Exit code 2."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        """Name of the job file."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.lines()))

    def lines(self) -> tuple[str, ...]:
        """Format one line for each mistake, starting with the file and, where known, its line."""
        return tuple(
            f"{self.source}:{problem.line}: {problem}" if problem.line else f"{self.source}: {problem}"
            for problem in self.problems
        )


def path_text(location: Location) -> str:
    """Format a location: `("spec", "sources", 1, "uri")` -> `spec.sources[1].uri`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")
