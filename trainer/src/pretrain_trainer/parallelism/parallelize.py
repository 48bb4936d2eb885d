"""Partition of the model over the ranks: pipeline stages, parts of matrices, shards of state; in that order.

All of it happens on the meta device, so that no rank ever holds more than its own part. Parameters keep the names and
global shapes of the whole model (as DTensors if a rank has a part), and so do checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from pretrain_trainer.core.mesh import Mesh, MeshPosition
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.models.decoder import Decoder, initial_values
from pretrain_trainer.parallelism.fsdp import shard_over
from pretrain_trainer.parallelism.pipeline import keep_stage
from pretrain_trainer.parallelism.tensor_parallel import cut_matrices

PIPELINE, REPLICATE, SHARD, TENSOR = "pipeline", "replicate", "shard", "tensor"


@dataclass(frozen=True)
class Groups:
    """Position of this rank in the mesh, and its process groups along the dimensions; None: no communication."""

    mesh: Mesh
    place: MeshPosition
    sharded: bool
    """True if FSDP2 sums gradients, over `shard` and `replicate`."""
    devices: DeviceMesh | None = None
    """Dimensions of more than one rank, and `shard` if the state is sharded; in torch's order."""
    ends: dist.ProcessGroup | None = None
    """Group of this replica's first and last stage, which both have a tied embedding."""

    @classmethod
    def over(cls, mesh: Mesh, ranks: Ranks, sharded: bool, tied: bool) -> Self:
        """Make the groups of a world with this mesh. Collective."""
        place, sizes = mesh.place(ranks.rank), _sizes(mesh)
        kept = [name for name in sizes if sizes[name] > 1 or (name == SHARD and sharded)]
        if not kept or kept == [REPLICATE]:
            return cls(mesh, place, sharded)  # plain data parallel needs the default group only
        laid_out = torch.arange(ranks.world_size).view(-1, mesh.shards, mesh.pipeline, mesh.tensor).permute(2, 0, 1, 3)
        shape = [sizes[name] for name in kept]
        devices = DeviceMesh(ranks.device.type, laid_out.reshape(shape), mesh_dim_names=tuple(kept))
        return cls(mesh, place, sharded, devices, _ends(laid_out, place) if tied and mesh.pipeline > 1 else None)

    def along(self, *names: str) -> DeviceMesh | None:
        """Return the submesh of the named dimensions that exist; None without any."""
        there = tuple(name for name in names if self.devices and name in (self.devices.mesh_dim_names or ()))
        return self.devices[there] if self.devices is not None and there else None

    def group(self, name: str) -> dist.ProcessGroup | None:
        """Return the group of ranks that differ from this one along that dimension alone."""
        along = self.along(name)
        return along.get_group() if along is not None else None

    def holders(self, name: str, parameter: Tensor) -> int:
        """Return the number of ranks with the same part of this parameter as this rank."""
        parts = self.mesh.pipeline
        if isinstance(parameter, DTensor):
            for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
                parts *= 1 if placement.is_replicate() else size  # FSDP2's strided shards are no `is_shard`
        world_size = self.mesh.replicas * self.mesh.pipeline * self.mesh.tensor
        return world_size // parts * (2 if self.ends is not None and name == "token_embedding.weight" else 1)


def lay_out(model: Decoder, groups: Groups, bf16: bool, exact: bool) -> None:
    """Reduce a model on the meta device to this rank's part of it, in place.

    With `exact` FSDP2 spans one set of shards only: sums over the sets are made elsewhere.
    """
    if groups.mesh.pipeline > 1:
        keep_stage(model, groups.place)
    if (tensor := groups.along(TENSOR)) is not None:
        cut_matrices(model, tensor)
    dimensions = (SHARD,) if exact else (REPLICATE, SHARD)
    if groups.sharded and (shards := groups.along(*dimensions)) is not None:
        shard_over(model, shards, bf16)


@torch.no_grad()
def initialise_part(model: Decoder, seed: int) -> None:
    """Set this rank's parameters to their parts of the whole model's values for the seed."""
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed):
        if name in parameters:
            set_part(parameters[name], value)


@torch.no_grad()
def set_part(parameter: Tensor, whole: Tensor) -> None:
    """Set this rank's part of a parameter from the whole value."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    for dimension, (begin, length) in enumerate(zip(offset, shape, strict=True)):
        whole = whole.narrow(dimension, begin if length else 0, length)
    parameter.to_local().copy_(whole)


def _sizes(mesh: Mesh) -> dict[str, int]:
    return {
        PIPELINE: mesh.pipeline,
        REPLICATE: mesh.replicas // mesh.shards,
        SHARD: mesh.shards,
        TENSOR: mesh.tensor,
    }


def _ends(laid_out: Tensor, place: MeshPosition) -> dist.ProcessGroup | None:
    """Make the groups of the first and last stage of each replica and tensor rank; None on the stages between."""
    pairs = torch.stack((laid_out[0], laid_out[-1]), dim=-1).view(-1, 2).tolist()
    group, _ = dist.new_subgroups_by_enumeration(pairs)
    return cast(dist.ProcessGroup, group) if place.begins or place.ends else None
