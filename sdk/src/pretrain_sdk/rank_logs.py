"""Log files of ranks."""

from __future__ import annotations

from pathlib import Path

LOGS_VARIABLE = "PRETRAIN_RANK_LOGS"
"""Variable with the folder of the generation's logs, if there is one."""
TAIL_LINES = 20
TAIL_BYTES = 8192


def rank_log(run_dir: Path, number: int, rank: int, stream: str) -> Path:
    """Return the log file of one stream (`out` or `err`) of a global rank in a generation."""
    return run_dir / "logs" / f"g{number:06d}" / f"rank{rank}.{stream}"


def last_lines(path: Path) -> str:
    """Read the last 20 lines of a file; empty if it does not exist."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-TAIL_LINES:])
