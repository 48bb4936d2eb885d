"""Who this process is among the others, and the process group that joins them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from pretrain_trainer.core.mesh import Mesh, MeshPosition


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world_size`, computing on `device`; its worker has `worker_size` of them."""

    rank: int
    world_size: int
    device: torch.device
    worker_size: int = 1
    mesh: Mesh | None = None
    """How the ranks are laid out; None: each is a replica of the model."""

    @property
    def place(self) -> MeshPosition:
        """Which part of the model this rank has, and which share of the data."""
        return (self.mesh or Mesh(self.world_size)).place(self.rank)

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0


_ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
"""Torchrun's variables, and what a process is that it did not start."""


@contextmanager
def process_group(environ: Mapping[str, str]) -> Iterator[Ranks]:
    """Join the process group that the environment names, or one of a single process where it names none.

    Left without error the group is destroyed. After an error it is not: peers may be gone, and taking the group
    down would wait for them.
    """
    rank, world_size, worker_size = (int(environ.get(name, number)) for name, number in _ALONE.items())
    ranks = Ranks(rank, world_size, _device(environ), worker_size)
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
