"""Environment variables of this process, parsed once at the program's edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pretrain_sdk.rank_logs import LOGS_VARIABLE


@dataclass(frozen=True)
class Environment:
    """Settings that a process inherits. The defaults are those of a process that torchrun did not start."""

    variables: Mapping[str, str]
    """All variables, for the libraries that read their own: credentials of stores, the compiler."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    rendezvous: bool = False
    """True where other ranks are reached at MASTER_ADDR."""
    user_cache: Path = Path("/tmp/.cache")
    scratch: Path = Path("/tmp")
    logs: Path | None = None
    """The folder of the ranks' logs, if the agent keeps one."""

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> Self:
        """Parse the variables. Raises ValueError where torchrun's are no numbers."""
        logs = variables.get(LOGS_VARIABLE)
        return cls(
            variables,
            rank=int(variables.get("RANK", "0")),
            world_size=int(variables.get("WORLD_SIZE", "1")),
            local_rank=int(variables.get("LOCAL_RANK", "0")),
            local_world_size=int(variables.get("LOCAL_WORLD_SIZE", "1")),
            rendezvous="MASTER_ADDR" in variables,
            user_cache=Path(variables.get("XDG_CACHE_HOME") or Path(variables.get("HOME") or "/tmp") / ".cache"),
            scratch=Path(variables.get("TMPDIR") or "/tmp"),
            logs=Path(logs) if logs else None,
        )
