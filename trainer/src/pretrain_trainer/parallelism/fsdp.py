"""FSDP2: sharding of the model's state over the ranks, block by block."""

from __future__ import annotations

import warnings

from torch import bfloat16, float32
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from pretrain_trainer.models.decoder import Block, Decoder


def shard_over(model: Decoder, mesh: DeviceMesh, bf16: bool) -> None:
    """Shard parameters, gradients and optimizer state over the mesh, in place.

    A mesh of two dimensions is HSDP's: copies along the first, shards along the second. Gradients are summed, not
    averaged: the loss has its weights already. Only the factor 1 with forced sums is right on every backend and world
    size (other factors need PREMUL_SUM, and divide twice at world size 1 in torch 2.13).
    """
    # Logits gathered from tensor ranks are a view; no in-place operation follows.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    policy = MixedPrecisionPolicy(bfloat16, float32) if bf16 else MixedPrecisionPolicy()
    for block in model.blocks:
        if isinstance(block, Block):  # not the placeholder of another stage's block
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():  # the setters do not recurse
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
