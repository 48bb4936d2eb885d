"""Where ranks write, and the end of what they wrote."""

from __future__ import annotations

from pathlib import Path

LOGS_VARIABLE = "PRETRAIN_RANK_LOGS"
"""Tells ranks the folder of their generation's logs, where there is one."""
TAIL_LINES = 20
TAIL_BYTES = 8192


def rank_log(run_dir: Path, number: int, rank: int, stream: str) -> Path:
    """The file of one stream (`out` or `err`) of one global rank in one generation."""
    return run_dir / "logs" / f"g{number:06d}" / f"rank{rank}.{stream}"


def last_lines(path: Path) -> str:
    """The last 20 lines of a file; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-TAIL_LINES:])
