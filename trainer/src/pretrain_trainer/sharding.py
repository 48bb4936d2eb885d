"""FSDP2: the model's state laid over the ranks, block by block."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from pretrain_trainer.model import Decoder
from pretrain_trainer.ranks import Ranks


def shard_fully(model: Decoder, ranks: Ranks, bf16: bool) -> None:
    """Shard parameters, gradients and optimizer state over all ranks, in place.

    Gradients are summed, not averaged: the loss has its weights already. Only the factor 1 with forced sums is right
    on every backend and world size (other factors need PREMUL_SUM, and divide twice at world size 1 in torch 2.13).
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():  # the setters do not recurse
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
