"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019, Korthikanti et al. 2022), in torch's own styles.

Each block's first matrices are split by rows (whole heads, parts of the perceptron), its last ones by columns;
embedding and head by tokens of the vocabulary. Between blocks a rank has a part of every sequence; norms gather it and
the last matrices reduce-scatter it, which sends as much as an all-reduce and keeps less. With post-norm the first
matrices gather it instead: a norm's output is the residual stream as well.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from pretrain_trainer.models.decoder import Attention, Decoder
from pretrain_trainer.models.dropout import Dropout, Portion

SEQUENCE = Shard(1)


class GatheringNorm(ParallelStyle):
    """Norm of this rank's part of the sequence, with a result that is gathered once for all readers."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # torch's types say that these hooks return nothing; their result replaces input and output.
        return distribute_module(module, device_mesh, None, cast(Any, _part), cast(Any, _gathered))


def cut_matrices(model: Decoder, mesh: DeviceMesh) -> None:
    """Partition every parameter of a model on the meta device over the tensor ranks, in place."""
    post_norm = model.shape.norm == "post"
    normed = SequenceParallel(use_local_output=True) if post_norm else GatheringNorm()
    gathering = ColwiseParallel(input_layouts=SEQUENCE if post_norm else Replicate())
    styles: dict[str, ParallelStyle] = {
        "token_embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE),
        "position_embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "norm_1": normed,
        "qkv": gathering,
        "proj": RowwiseParallel(output_layouts=SEQUENCE),
        "norm_2": normed,
        "up": gathering,
        "gate": gathering,
        "down": RowwiseParallel(output_layouts=SEQUENCE),
        "norm": GatheringNorm(),
        "head": ColwiseParallel(),
    }
    for name, module in list(model.named_modules()):
        style = styles.get(name.rpartition(".")[2])
        if style is not None:
            parallelize_module(module, mesh, style, src_data_rank=None)
        if isinstance(module, Attention | Dropout):
            module.portion = Portion(mesh.get_local_rank(), mesh.size())


def _part(_: nn.Module, inputs: tuple[DTensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
    (x,) = inputs
    return (DTensor.from_local(x, mesh, (SEQUENCE,), run_check=False),)


def _gathered(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> DTensor:
    return output.redistribute(mesh, (Replicate(),))
