"""What a checkpoint is loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from pretrain_trainer.checkpoint.dcp.load import Loading, Received, replaceable, scalars
from pretrain_trainer.checkpoint.dcp.state import (
    make_optimizer_state,
    optimizer_entries,
    replace,
    tensors_of,
    tensors_of_model,
)
from pretrain_trainer.core.errors import InvalidInput

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

    @property
    def replaceable(self) -> bool:
        """Whether memory that a checkpoint was received in can become the model's and the optimizer's."""
        return all(replaceable(tensor) for tensor in tensors_of_model(self.model).values())

    def take(self, loading: Loading, received: Mapping[str, Received]) -> None:
        """Have verified files in memory become the state, without another copy where that can be; or raise Unusable."""
        replace(self.model, self.optimizer, loading.take(received))

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
