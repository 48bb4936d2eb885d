"""What a checkpoint is loaded into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from pretrain_trainer.checkpoint.loading import Loading, scalars
from pretrain_trainer.checkpoint.state import make_optimizer_state, optimizer_entries, tensors_of
from pretrain_trainer.errors import InvalidInput

_ENTRIES = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


@dataclass(frozen=True)
class Target:
    """A model and its optimizer, which is of this kind."""

    model: nn.Module
    optimizer: Optimizer
    kind: str

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of both by name."""
        return tensors_of(self.model, self.optimizer)

    def plan(self, metadata: Metadata, where: str) -> Loading:
        """What of a checkpoint goes where in this process; the optimizer gets room for it.

        Raises Unusable; InvalidInput when it is the state of another kind of optimizer. `where` names the checkpoint.
        """
        entries = optimizer_entries(metadata.state_dict_metadata, self.model)
        found = {entry for names in entries.values() for entry in names}
        if found and found != _ENTRIES[self.kind]:
            raise InvalidInput(
                f"training.optimizer.kind: checkpoint {where} holds the state of another optimizer than {self.kind}; "
                "change it back, or start anew under another path or prefix in checkpoint.storage"
            )
        make_optimizer_state(self.model, self.optimizer, entries, scalars(metadata))
        return Loading(self.tensors(), metadata)
