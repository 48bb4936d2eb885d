"""Model and optimizer as the target of a restore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from pretrain_trainer.checkpoint.dcp.load import ReceivedObject, TensorLoader, replaceable, scalar_names
from pretrain_trainer.checkpoint.dcp.state import (
    make_optimizer_state,
    optimizer_entries,
    replace_tensors,
    tensors_of,
    tensors_of_model,
)
from pretrain_trainer.core.errors import InvalidInput

_ENTRIES = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


@dataclass(frozen=True)
class RestoreTarget:
    """A model and its optimizer of this kind."""

    model: nn.Module
    optimizer: Optimizer
    kind: str

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of both by name."""
        return tensors_of(self.model, self.optimizer)

    @property
    def replaceable(self) -> bool:
        """True if memory that holds a checkpoint can become the memory of model and optimizer."""
        return all(replaceable(tensor) for tensor in tensors_of_model(self.model).values())

    def take(self, loading: TensorLoader, received: Mapping[str, ReceivedObject]) -> None:
        """Make verified files in memory the state, without a copy if possible. Raises UnusableFiles before it."""
        replace_tensors(self.model, self.optimizer, loading.take(received))

    def plan(self, metadata: Metadata, where: str) -> TensorLoader:
        """Plan the load of a checkpoint, named `where` in messages, and give the optimizer room for its state.

        Raises UnusableFiles; InvalidInput when the checkpoint has the state of another kind of optimizer.
        """
        entries = optimizer_entries(metadata.state_dict_metadata, self.model)
        found = {entry for names in entries.values() for entry in names}
        if found and found != _ENTRIES[self.kind]:
            raise InvalidInput(
                f"training.optimizer.kind: checkpoint {where} holds the state of another optimizer than {self.kind}; "
                "change it back, or start from scratch under another path or prefix in checkpoint.storage"
            )
        make_optimizer_state(self.model, self.optimizer, entries, scalar_names(metadata))
        return TensorLoader(self.tensors(), metadata)
