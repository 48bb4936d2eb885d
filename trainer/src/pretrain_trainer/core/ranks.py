"""Rank, world size and device of this process, and the process group that it joins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.mesh import Mesh, MeshPosition


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `world_size`, which computes on `device`, in a worker of `worker_size` processes."""

    rank: int
    world_size: int
    device: torch.device
    worker_size: int = 1
    mesh: Mesh | None = None
    """Layout of the ranks; None: each rank is a replica of the model."""

    @property
    def place(self) -> MeshPosition:
        """Position of this rank: its part of the model and its share of the data."""
        return (self.mesh or Mesh(self.world_size)).place(self.rank)

    @property
    def first(self) -> bool:
        """True on rank 0, which reports for all ranks."""
        return self.rank == 0


@contextmanager
def process_group(environment: Environment) -> Iterator[Ranks]:
    """Join the process group of the environment, or create one of a single process.

    On a normal exit the group is destroyed. After an error it is left: destroying it waits for peers, which may be
    gone.
    """
    ranks = Ranks(environment.rank, environment.world_size, _device(environment), environment.local_world_size)
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    if environment.rendezvous:
        dist.init_process_group(backend, init_method="env://")
    else:
        dist.init_process_group(backend, store=HashStore(), rank=ranks.rank, world_size=ranks.world_size)
    yield ranks
    dist.destroy_process_group()


def _device(environment: Environment) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", environment.local_rank)
    torch.cuda.set_device(device)
    return device
