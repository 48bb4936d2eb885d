"""Workload: a decoder with AdamW (12 bytes of state per parameter), and our checkpointer."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import JOB

from pretrain_api.checkpoint.lineage import JobIdentity
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.trainer_config import TrainerConfig, trainer_config
from pretrain_api.spec.job import Checkpoint, Interval, Retain, Storage
from pretrain_api.spec.model import Model, resolve
from pretrain_cli.inputs.job_file import load_job
from pretrain_trainer.checkpoint import Checkpointer
from pretrain_trainer.checkpoint.dcp.state import tensors_of
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.models.decoder import build, initialise
from pretrain_trainer.models.loss import Objective
from pretrain_trainer.models.optimizer import build_optimizer

WIDTH, ROWS, CONTEXT = 768, 8192, 64
_IDENTITY = JobIdentity(
    model_digest="m", data_digest="d", tokenizer_digest="t", seed=1, batch_sequences=1, context=CONTEXT
)


class Work:
    """Model of about `parameters` parameters. A step takes one sequence: just long enough to be disturbed by a save."""

    def __init__(self, parameters: float, initialised: bool = True) -> None:
        layers = max(1, round((parameters - ROWS * WIDTH) / (12 * WIDTH * WIDTH)))
        shape = resolve(Model(family="gpt2", layers=layers, heads=12, width=WIDTH, context=CONTEXT))
        self.model = build(shape, ROWS, torch.device("cpu"))
        if initialised:
            initialise(self.model, seed=1)
        self.optimizer = build_optimizer(self.model, load_job(JOB).spec.training.optimizer)
        self._objective = Objective()
        self._windows = torch.randint(ROWS, (1, CONTEXT + 1), generator=torch.Generator().manual_seed(1))

    def step(self) -> None:
        """Run forward, backward and update."""
        self.optimizer.zero_grad()
        self._objective(self.model, self._windows).backward()
        self.optimizer.step()

    @property
    def bytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in tensors_of(self.model, self.optimizer).values())


class Ours:
    """Our checkpointer in a job with one worker: consecutive generations of one history."""

    def __init__(self, storage: Storage, ranks: Ranks, environ: Mapping[str, str] = os.environ) -> None:
        checkpoint = Checkpoint(storage=storage, interval=Interval(steps=1_000_000), retain=Retain(last=2))
        config = trainer_config(load_job(JOB), "benchmark")
        self._config: TrainerConfig = config.model_copy(update={"checkpoint": checkpoint})
        self._ranks, self._environ = ranks, environ
        self._number = 0
        self._step = 0
        self.generation: Checkpointer = self.reopened()
        self.stages: dict[str, float] = {}
        """Seconds of the last save and restore, by stage."""

    def reopened(self) -> Checkpointer:
        """Open the next generation, whose parent is the latest checkpoint."""
        self._number += 1
        generation = Generation(
            number=self._number,
            job_uid="benchmark",
            members=(),
            store_host="",
            store_port=0,
            reason="Started",
            may_take_over=self._number == 1,
        )
        self.generation = Checkpointer.open(self._config, _IDENTITY, generation, self._ranks, self._environ)
        return self.generation

    def begin(self, work: Work) -> None:
        """Start a save."""
        self._step += 1
        self.generation.save(TrainingProgress(self._step), work.model, work.optimizer)

    def finish(self) -> float:
        """Wait for the commit and return the seconds since the start."""
        self.generation.wait()
        (outcome,) = self.generation.poll()
        if not hasattr(outcome, "seconds"):
            sys.exit(f"a save failed: {outcome}")
        self.stages |= {f"save {name}": seconds for name, seconds in outcome.stages.items()}
        return outcome.seconds
