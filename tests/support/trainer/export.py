"""Finished runs with real checkpoints, and what Hugging Face makes of their exports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pretrain_api.messages.reports import ReportBody
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_trainer.checkpoint import Checkpointer
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import TrainerError
from pretrain_trainer.loop.train import train
from pretrain_trainer.observability.failures import ProcessExit, process_exit
from support.trainer.world import FakeLink, a_generation, run_ranks

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"family": "gpt2", "layers": 2, "heads": 2, "width": 32, "context": 16},
    "llama": {"family": "llama", "layers": 2, "heads": 4, "kvHeads": 2, "width": 32, "context": 16},
}


def trained(config: TrainerConfig, world_size: int = 1, number: int = 1) -> list[ReportBody]:
    """Train as generation `number` with real checkpoints; what rank 0 reported. Errors of training are raised."""
    return run_ranks(world_size, _train, config, number, world_size)[0]


def _train(environ: Mapping[str, str], config: TrainerConfig, number: int, workers: int) -> list[ReportBody]:
    link = FakeLink(generation=a_generation(number, workers).model_copy(update={"may_take_over": number == 1}))
    train(config, link, Checkpointer.open, Environment.of(environ))
    return link.reports


def refused(config: TrainerConfig, number: int = 1) -> ProcessExit:
    """End of a generation of one rank that must not train."""
    return run_ranks(1, _refused, config, number)[0]


def _refused(environ: Mapping[str, str], config: TrainerConfig, number: int) -> ProcessExit:
    try:
        _train(environ, config, number, 1)
    except TrainerError as error:
        return process_exit(error, 0)
    raise AssertionError("it trained")


def held_out_loss(folder: Path, tokens: Path, sequences: int, context: int) -> float:
    """The mean loss of an exported model over the first windows of a source, in nats per token."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    read = np.fromfile(tokens, dtype="<u2").astype(np.int64)
    windows = np.stack([read[at * context : at * context + context + 1] for at in range(sequences)])
    with torch.no_grad():
        logits = model(torch.from_numpy(windows[:, :-1])).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(windows[:, 1:]).flatten())
    return float(losses)


def a_job_file(config: TrainerConfig, file: Path) -> Path:
    """The job that such a configuration is of; JSON is YAML."""
    fields = json.loads(config.to_json())
    spec = {"training": fields["training"], "checkpoint": fields["checkpoint"]}
    job = {"apiVersion": "pretrain.dev/v1alpha1", "kind": "PretrainJob", "metadata": {"name": config.job_name}}
    file.write_text(json.dumps(_without_nulls(job | {"spec": spec})))
    return file


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
