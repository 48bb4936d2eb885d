"""Where each rank stands: in which replica of the model, and there in which pipeline stage, on which tensor rank.

Pure arithmetic of the world size and the configuration. The ranks of a replica follow each other, so that any number of
whole replicas is a world; within one the tensor ranks of a stage do, since they talk most and should be on one host:

    rank = (replica * pipeline + stage) * tensor + part
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pretrain_api.spec.replicas import nearest, replica_processes
from pretrain_api.spec.training import Parallelism
from pretrain_trainer.core.errors import InvalidInput


@dataclass(frozen=True)
class Place:
    """A rank's place in the mesh. Replicas share out the data; ranks of one replica see the same of it."""

    replica: int
    replicas: int
    stage: int = 0
    stages: int = 1
    part: int = 0
    """Of the matrices."""
    parts: int = 1

    @property
    def begins(self) -> bool:
        """Whether it is of the stage that reads tokens."""
        return self.stage == 0

    @property
    def ends(self) -> bool:
        """Whether it is of the stage that makes logits and knows the loss."""
        return self.stage == self.stages - 1

    @property
    def counts(self) -> bool:
        """Whether the replica's loss is this rank's to add: one of its ranks does."""
        return self.ends and self.part == 0


@dataclass(frozen=True)
class Mesh:
    """The shape of the world: `replicas` of the model, in sets of `shards` that share one copy of the state."""

    replicas: int
    shards: int = 1
    pipeline: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, parallelism: Parallelism, world_size: int, worker_size: int) -> Self:
        """The mesh of so many processes, `worker_size` a worker. Raises InvalidInput with sizes that would fit."""
        replica = replica_processes(parallelism)
        asked = f"training.parallelism (tensor {parallelism.tensor} x pipeline {parallelism.pipeline})"
        if world_size % replica:
            raise InvalidInput(
                f"{asked} takes {replica} processes for each replica of the model, of which {world_size} are no "
                f"multiple: run {nearest(world_size, replica)}"
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
        """Whether a replica is one process."""
        return self.pipeline == 1 and self.tensor == 1

    @property
    def parts(self) -> int:
        """In how many parts the state lies on the ranks."""
        return self.shards * self.pipeline * self.tensor

    def part(self, rank: int) -> int:
        """Which of the parts this rank has; others may have the same."""
        place = self.place(rank)
        return (place.replica % self.shards * self.pipeline + place.stage) * self.tensor + place.part

    def place(self, rank: int) -> Place:
        """Where this rank stands."""
        rest, part = divmod(rank, self.tensor)
        replica, stage = divmod(rest, self.pipeline)
        return Place(replica, self.replicas, stage, self.pipeline, part, self.tensor)
