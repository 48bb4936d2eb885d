"""Layout of the ranks: replicas of the model, and within a replica pipeline stages and tensor ranks.

Pure arithmetic of the world size and the configuration. The ranks of a replica are consecutive, so that any number of
whole replicas is a world. Within a replica the tensor ranks of a stage are consecutive, since they communicate most and
should share a host:

    rank = (replica * pipeline + stage) * tensor + part
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pretrain_api.spec.replicas import nearest, replica_processes
from pretrain_api.spec.training import Parallelism
from pretrain_trainer.core.errors import InvalidInput


@dataclass(frozen=True)
class MeshPosition:
    """A rank's position in the mesh. Replicas divide the data; all ranks of one replica see the same data."""

    replica: int
    replicas: int
    stage: int = 0
    stages: int = 1
    part: int = 0
    """Index of the tensor rank."""
    parts: int = 1
    """Number of tensor ranks."""

    @property
    def begins(self) -> bool:
        """True in the first pipeline stage, which reads tokens."""
        return self.stage == 0

    @property
    def ends(self) -> bool:
        """True in the last pipeline stage, which computes logits and the loss."""
        return self.stage == self.stages - 1

    @property
    def counts(self) -> bool:
        """True on the one rank of a replica that adds the replica's loss to sums over all ranks."""
        return self.ends and self.part == 0


@dataclass(frozen=True)
class Mesh:
    """Shape of the world: `replicas` of the model; each group of `shards` replicas shares one copy of the state."""

    replicas: int
    shards: int = 1
    pipeline: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, parallelism: Parallelism, world_size: int, worker_size: int) -> Self:
        """Lay out `world_size` processes, `worker_size` per worker. Raises InvalidInput that names sizes that fit."""
        replica = replica_processes(parallelism)
        asked = f"training.parallelism (tensor {parallelism.tensor} x pipeline {parallelism.pipeline})"
        if world_size % replica:
            raise InvalidInput(
                f"{asked} takes {replica} processes for each replica of the model, and {world_size} processes are no "
                f"multiple of that: run {nearest(world_size, replica)}"
            )
        replicas = world_size // replica
        shards = {"none": 1, "full": replicas, "hybrid": max(1, worker_size // replica)}[parallelism.shard]
        if parallelism.shard == "hybrid" and (worker_size % replica or replicas % shards):
            raise InvalidInput(
                f"training.parallelism.shard: hybrid shards within a worker, whose {worker_size} processes must hold "
                f"whole replicas of {replica}: set workers.processesPerWorker to {nearest(worker_size, replica)}, "
                "or shard to full"
            )
        return cls(replicas, shards, parallelism.pipeline, parallelism.tensor)

    @property
    def plain(self) -> bool:
        """True where a replica is one process."""
        return self.pipeline == 1 and self.tensor == 1

    @property
    def parts(self) -> int:
        """Number of distinct parts of the state."""
        return self.shards * self.pipeline * self.tensor

    def part(self, rank: int) -> int:
        """Return the index of the part that this rank holds; other ranks may hold the same."""
        place = self.place(rank)
        return (place.replica % self.shards * self.pipeline + place.stage) * self.tensor + place.part

    def place(self, rank: int) -> MeshPosition:
        """Return the position of a rank."""
        rest, part = divmod(rank, self.tensor)
        replica, stage = divmod(rest, self.pipeline)
        return MeshPosition(replica, self.replicas, stage, self.pipeline, part, self.tensor)
