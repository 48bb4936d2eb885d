"""A small model with its optimizer, jobs that save it, and stores that fail or stall, for tests of checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pretrain_api.checkpoint.lineage import JobIdentity, StoredObject
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_store.directory import DirectoryStore
from pretrain_store.errors import StoreUnavailable
from pretrain_trainer.checkpoint import Checkpointer, checkpointer
from pretrain_trainer.checkpoint.dcp.state import tensors_of
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks, process_group
from support.store.values import an_identity
from support.trainer.world import a_config, a_generation

ENVIRON: Mapping[str, str] = {}
ALONE = Ranks(0, 1, torch.device("cpu"))


class Tied(nn.Module):
    """An embedding that is its own head, sizes that no number of ranks divides, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("mask", torch.zeros(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.linear(self.embedding(tokens))))


class Trained:
    """A model and its AdamW, some steps along."""

    def __init__(self, seed: int = 1, steps: int = 0, sharded: bool = False, kind: str = "adamw") -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = Tied()
        if sharded:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
        if kind == "adamw":
            self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.train(steps)

    def train(self, steps: int) -> None:
        """Steps whose data depend on how many were done, and the same for every number of ranks."""
        for step in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.arange(8) + step % 3).square().mean().backward()
            self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """All tensors in full; collective when sharded."""
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
            for name, tensor in tensors_of(self.model, self.optimizer).items()
        }


def a_job(folder: Path, *, shard: str = "none", kind: str = "adamw", **fields: Any) -> TrainerConfig:
    """The configuration of a job whose checkpoints are in `folder`/checkpoints."""
    return a_config(folder, {"parallelism": {"shard": shard}, "optimizer": {"kind": kind}}, **fields)


def open_checkpointer(
    config: TrainerConfig,
    number: int | None = 1,
    ranks: Ranks = ALONE,
    *,
    rejected: tuple[str, ...] = (),
    first: bool | None = None,
    identity: JobIdentity | None = None,
    environ: Mapping[str, str] = ENVIRON,
) -> Checkpointer:
    """A checkpointer of generation `number` of a job; None: of an unattended run."""
    generation = None
    if number is not None:
        generation = a_generation(number, ranks.world_size).model_copy(
            update={"rejected": rejected, "may_take_over": number == 1 if first is None else first}
        )
    return Checkpointer.open(config, identity or an_identity(), generation, ranks, environ)


def saved(checkpointer: Checkpointer, trained: Trained, step: int, tokens: int = 0) -> str:
    """Save and commit; return the key of the manifest."""
    checkpointer.save(TrainingProgress(step, tokens), trained.model, trained.optimizer)
    key = checkpointer.wait()
    assert key is not None, checkpointer.poll()
    return key


def restored(
    checkpointer: Checkpointer, *, sharded: bool = False, kind: str = "adamw"
) -> tuple[TrainingProgress, Trained]:
    """Restore into a model of other values, whose optimizer has no state yet."""
    trained = Trained(seed=99, sharded=sharded, kind=kind)
    return checkpointer.restore(trained.model, trained.optimizer), trained


def assert_equal(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """The same names with bit-equal tensors, or arrays of such."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(torch.as_tensor(left[name]), torch.as_tensor(right[name]))]
    assert not different


def arrays(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A state that can be sent to another process."""
    return {name: tensor.numpy() for name, tensor in state.items()}


class FlakyStore(DirectoryStore):
    """A folder that can be `down`, or stall: with a closed `gate` only `passes` files are put."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.down = False
        self.passes = 0
        self.gate = threading.Event()
        self.gate.set()
        self.stalled = threading.Event()

    def put_file(self, key: str, path: Path) -> StoredObject:
        if not self.gate.is_set():
            self.passes -= 1
            if self.passes < 0:
                self.stalled.set()
                assert self.gate.wait(60)
        if self.down:
            raise StoreUnavailable("no route to the store")
        return super().put_file(key, path)


def a_flaky_store(folder: Path, patch: pytest.MonkeyPatch) -> FlakyStore:
    """The store of `a_job(folder)`, which checkpointers opened from now on share."""
    store = FlakyStore(folder / "checkpoints")
    patch.setattr(checkpointer, "open_store", lambda *_: store)
    return store


def on_rank(environ: Mapping[str, str], act: Callable[..., Any], *arguments: Any) -> Any:
    """Call `act(ranks, *arguments)` as one of the ranks of `run_ranks`, in their process group."""
    with process_group(Environment.of(environ)) as ranks:
        return act(ranks, *arguments)
