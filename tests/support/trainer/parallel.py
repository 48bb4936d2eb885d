"""Runs under one parallelism after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain_api.messages.reports import Evaluated, Sampled
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_trainer.checkpoint import Checkpointer
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.loop.train import train
from pretrain_trainer.observability.failures import process_exit
from support.trainer.world import RANK_SECONDS, FakeLink, RankEnd, a_config, a_generation, run_ranks

GPT2 = {"family": "gpt2", "layers": 4, "heads": 4, "width": 32, "context": 16}
LLAMA = {"family": "llama", "layers": 4, "heads": 4, "kvHeads": 2, "width": 32, "context": 16}

STEADY = {"learningRate": 1e-2, "epsilon": 1e-5}
"""An AdamW that does not magnify the rounding of a gradient near zero, of which dropout makes some, to an update."""


@dataclass(frozen=True)
class Case:
    """A run: its configuration, and on how many processes."""

    config: TrainerConfig
    world_size: int = 1
    worker_size: int = 1
    generation: int = 1


@dataclass(frozen=True)
class Laid:
    """Parallelism of a run, as its test is named: `full, tensor 2, pipeline 1 on 4`."""

    shard: str = "none"
    tensor: int = 1
    pipeline: int = 1
    world_size: int = 1
    worker_size: int = 1

    def __str__(self) -> str:
        return f"{self.shard}, tensor {self.tensor}, pipeline {self.pipeline} on {self.world_size}"

    def case(self, corpus: Path, model: Mapping[str, Any], folder: Path, generation: int = 1, **training: Any) -> Case:
        """A run of the model like this. It evaluates on the way, samples at the end, and saves every other step."""
        sources = [{"name": name, "uri": str(corpus / name)} for name in ("held-out", "code")]
        parallelism = {"shard": self.shard, "tensor": self.tensor, "pipeline": self.pipeline}
        settings = {
            "model": dict(model),
            "parallelism": parallelism,
            "evaluation": {"every": 3, "sequences": 10, "sources": sources},
            "sampling": {"prompt": "w1 w3", "tokens": 5},
        }
        checkpoint = {"storage": {"path": str(folder)}, "interval": {"steps": 2}}
        config = a_config(corpus, settings | training, checkpoint=checkpoint)
        return Case(config, self.world_size, self.worker_size, generation)


def run_cases(cases: Sequence[Case], seconds: float = RANK_SECONDS) -> list[RankEnd]:
    """Train each in turn, with real checkpoints and a time limit; return the end of rank 0 of each."""
    return [ends[0] for ends in run_all_ranks(cases, seconds)]


def run_all_ranks(
    cases: Sequence[Case],
    seconds: float = RANK_SECONDS,
    checkpointer: type[Checkpointer] = Checkpointer,
) -> list[list[RankEnd]]:
    """Train each in turn, with real checkpoints; how all ranks of each ended.

    Each has processes of its own: torch remembers a mesh's groups by their names, and takes those of an equal mesh of
    an earlier case for them. And the peers of one that failed are told when it ends.
    """
    return [
        run_ranks(case.world_size, train_case, case, checkpointer, worker_size=case.worker_size, seconds=seconds)
        for case in cases
    ]


def assert_same_training(end: RankEnd, alone: RankEnd) -> None:
    """The losses of one process at every step, its norms, its evaluations and its text."""
    assert end.exit_code == 0, end.reports[-1]
    assert end.step_numbers == alone.step_numbers
    assert end.losses == pytest.approx(alone.losses, rel=1e-5)
    norms, wanted = ([step.grad_norm for step in run.steps] for run in (end, alone))
    assert norms == pytest.approx(wanted, rel=1e-3)
    assert len(end.of(Evaluated)) == len(alone.of(Evaluated)) > 0
    for mine, other in zip(end.of(Evaluated), alone.of(Evaluated), strict=True):
        assert mine.losses == pytest.approx(other.losses, rel=1e-4)
    assert [sample.text for sample in end.of(Sampled)] == [sample.text for sample in alone.of(Sampled)]


def train_case(environ: Mapping[str, str], case: Case, checkpointer: type[Checkpointer] = Checkpointer) -> RankEnd:
    """Train on this rank, with real checkpoints; how it ended."""
    workers = case.world_size // case.worker_size
    generation = a_generation(case.generation, workers).model_copy(update={"may_take_over": case.generation == 1})
    link = FakeLink({}, generation)
    try:
        train(case.config, link, checkpointer.open, Environment.of(environ))
    except Exception as error:
        end = process_exit(error, int(environ["RANK"]))
        return RankEnd([*link.reports, end.report], end.exit_code)
    return RankEnd(link.reports, 0)
