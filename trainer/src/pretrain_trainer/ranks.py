"""Who this process is among the others, and the process group that joins them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world_size`, computing on `device`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0


@contextmanager
def process_group(environ: Mapping[str, str]) -> Iterator[Ranks]:
    """Join the process group that the environment names, or one of a single process where it names none.

    Left without error the group is destroyed. After an error it is not: peers may be gone, and taking the group
    down would wait for them.
    """
    ranks = Ranks(int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1")), _device(environ))
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in environ:
        dist.init_process_group(backend, init_method="env://")
    else:
        dist.init_process_group(backend, store=HashStore(), rank=ranks.rank, world_size=ranks.world_size)
    yield ranks
    dist.destroy_process_group()


def _device(environ: Mapping[str, str]) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
