"""Pipeline parallelism: stages of whole blocks, with micro-batches in the order 1F1B (Narayanan et al. 2021).

A stage runs ahead by one forward pass per later stage, then alternates one forward and one backward: so no stage keeps
the activations of more micro-batches than there are stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from pretrain_trainer.core.errors import CollectiveFailed
from pretrain_trainer.core.mesh import MeshPosition
from pretrain_trainer.models.decoder import Decoder
from pretrain_trainer.parallelism.forward_backward import LossFunction, MicroBatch, padded
from pretrain_trainer.parallelism.gradients import Gradients


class StageGradients(Gradients, Protocol):
    """Gradients that accept a stage's output instead of a loss."""

    def backward(self, output: Tensor, gradient: Tensor | None, last: bool) -> None:
        """Run backward from the output; `last` for the step's last one."""
        ...


@dataclass(frozen=True)
class PipelineStage:
    """Stage of this rank, and the ranks of its replica's other stages."""

    place: MeshPosition
    group: dist.ProcessGroup
    """Ranks in the order of the stages."""
    device: torch.device
    handed_on: torch.dtype
    """Type of the tensors sent between stages."""
    autocast: bool
    """True if forward runs in bf16 autocast."""

    def exchange(self, towards: int, send: Tensor | None = None, receive: Sequence[int] | None = None) -> Tensor | None:
        """Send to the next (1) or previous (-1) stage, and receive a tensor of that shape from it, at the same time.

        Does nothing if there is no such stage.
        """
        peer = self.place.stage + towards
        if not 0 <= peer < self.place.stages:
            return None
        received = torch.empty(receive, dtype=self.handed_on, device=self.device) if receive is not None else None
        operations = []
        if send is not None:
            sent = send.detach().to(self.handed_on).contiguous()
            operations.append(dist.P2POp(dist.isend, sent, group=self.group, group_peer=peer))
        if received is not None:
            operations.append(dist.P2POp(dist.irecv, received, group=self.group, group_peer=peer))
        try:
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
        except RuntimeError as error:
            raise CollectiveFailed(str(error)) from error
        return received


@dataclass(frozen=True)
class _InFlightMicroBatch:
    """A micro-batch between its forward and its backward pass."""

    hidden: Tensor | None
    """Input from the stage before."""
    output: Tensor
    """Output to the next stage; on the last one the weighted loss."""


class PipelinedPasses:
    """Passes of micro-batches on the stages of one replica, in the order 1F1B."""

    def __init__(self, model: Decoder, loss: LossFunction, stage: PipelineStage) -> None:
        self._model = model
        self._loss = loss
        self._stage = stage

    def accumulate(self, work: Sequence[MicroBatch], gradients: Gradients) -> None:
        """See Passes. Forward passes ahead, then one forward and one backward in turn, then the remaining backwards."""
        stage, summed = self._stage, cast(StageGradients, gradients)
        ahead = min(len(work), stage.place.stages - 1 - stage.place.stage)
        flying: deque[_InFlightMicroBatch] = deque()
        hidden = self._receive(work[0]) if work else None
        for index, batch in enumerate(work):
            flying.append(self._forward(batch, hidden))
            following = work[index + 1] if index + 1 < len(work) else None
            output = flying[-1].output
            if index < ahead:
                stage.exchange(1, send=output)
                hidden = self._receive(following) if following else None
                continue
            gradient = stage.exchange(1, send=output, receive=output.shape)
            sent = self._backward(flying.popleft(), gradient, summed, last=not flying and following is None)
            hidden = stage.exchange(-1, send=sent, receive=self._shape(following.windows) if following else None)
        while flying:
            gradient = stage.exchange(1, receive=flying[0].output.shape)
            stage.exchange(-1, send=self._backward(flying.popleft(), gradient, summed, last=not flying))

    def loss(self, windows: Tensor) -> Tensor:
        """See Passes."""
        flight = self._forward(MicroBatch(windows, 1.0), self._stage.exchange(-1, receive=self._shape(windows)))
        self._stage.exchange(1, send=flight.output)
        return flight.output

    def next_logits(self, tokens: Tensor) -> Tensor:
        """See Passes. The last stage broadcasts the logits."""
        stage, row = self._stage, padded(tokens, self._stage.place.parts)
        hidden = stage.exchange(-1, receive=self._shape(functional.pad(row, (0, 1))))
        output = self._model(row.to(stage.device), hidden=hidden)
        stage.exchange(1, send=output)
        logits = torch.empty(self._model.rows, device=stage.device)
        if stage.place.ends:
            logits.copy_(output[0, len(tokens) - 1])
        dist.broadcast(logits, group=stage.group, group_src=stage.place.stages - 1)
        return logits

    def _receive(self, batch: MicroBatch) -> Tensor | None:
        return self._stage.exchange(-1, receive=self._shape(batch.windows))

    def _shape(self, windows: Tensor) -> tuple[int, int, int]:
        """Return the shape of a stage's output for these windows on one tensor rank."""
        sequences, length = windows.shape
        return sequences, (length - 1) // self._stage.place.parts, self._model.shape.width

    def _forward(self, batch: MicroBatch, hidden: Tensor | None) -> _InFlightMicroBatch:
        stage, windows = self._stage, batch.windows.to(self._stage.device)
        if hidden is not None:
            hidden.requires_grad_()
        if stage.place.ends:
            return _InFlightMicroBatch(hidden, self._loss(self._model, windows, hidden, batch.seed) * batch.weight)
        with torch.autocast(stage.device.type, torch.bfloat16, enabled=stage.autocast):
            return _InFlightMicroBatch(hidden, self._model(windows[:, :-1], hidden=hidden, seed=batch.seed))

    def _backward(
        self, flight: _InFlightMicroBatch, gradient: Tensor | None, gradients: StageGradients, last: bool
    ) -> Tensor | None:
        """Run backward of one micro-batch; return the gradient for the stage before."""
        if gradient is None:
            gradients.add(flight.output, last)
        else:
            gradients.backward(flight.output, gradient, last)
        return flight.hidden.grad if flight.hidden is not None else None


class BlockPlaceholder(nn.Module):
    """Placeholder of another stage's block, so that blocks keep their numbers."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Return the input."""
        return x


def keep_stage(model: Decoder, place: MeshPosition) -> None:
    """Reduce the model to this stage: its blocks; embeddings on the first stage; norm and head on the last.

    A tied embedding is on both, and stays equal there since its gradients are summed.
    """
    each = len(model.blocks) // place.stages
    for index in range(len(model.blocks)):
        if index // each != place.stage:
            model.blocks[index] = BlockPlaceholder()
    if not place.ends:
        model.norm = model.head = None
    if not place.begins:
        model.position_embedding = None
        if model.head is not None or not place.ends:
            model.token_embedding = None
