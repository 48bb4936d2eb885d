"""The model on this rank: built, laid out over the ranks, with its optimizer, gradients and passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.model import ResolvedModel
from pretrain_api.spec.replicas import round_up
from pretrain_api.spec.training import Training
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.datasets.remote_sources import cache_folder
from pretrain_trainer.loop.run_data import OpenedData
from pretrain_trainer.models.activation_checkpointing import recompute_activations
from pretrain_trainer.models.compile import compile_blocks
from pretrain_trainer.models.decoder import Decoder, skeleton
from pretrain_trainer.models.document_mask import end_of_document
from pretrain_trainer.models.loss import Objective
from pretrain_trainer.models.optimizer import build_optimizer
from pretrain_trainer.parallelism.exact import ExactGradients, ExactShardedGradients
from pretrain_trainer.parallelism.forward_backward import LossFunction, Passes, SequentialPasses
from pretrain_trainer.parallelism.gradients import FlatGradients, Gradients, ShardedGradients
from pretrain_trainer.parallelism.mesh_gradients import MeshGradients
from pretrain_trainer.parallelism.parallelize import PIPELINE, REPLICATE, Groups, initialise_part, lay_out
from pretrain_trainer.parallelism.pipeline import PipelinedPasses, PipelineStage


@dataclass(frozen=True)
class BuiltModel:
    """The model laid out over the ranks, and its optimizer."""

    shape: ResolvedModel
    rows: int
    """Rows of the embedding."""
    model: Decoder
    groups: Groups
    optimizer: torch.optim.Optimizer
    parameters: int
    """Number of parameters of the whole model."""


def build_model(
    config: TrainerConfig,
    shape: ResolvedModel,
    data: OpenedData,
    ranks: Ranks,
    environment: Environment,
    *,
    initialise: bool,
) -> BuiltModel:
    """Build the model and its optimizer. Without `initialise` the parameters are left to a restore."""
    training, rows = config.training, _embedding_rows(shape, data.corpus.vocabulary, config.training)
    assert ranks.mesh is not None  # set by `prepare`
    groups = Groups.over(ranks.mesh, ranks, training.parallelism.shard != "none", shape.tied_head)
    model = skeleton(shape, rows)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lay_out(model, groups, training.precision == "bf16", training.exact)
    model.to_empty(device=ranks.device)
    if initialise:
        initialise_part(model, training.seed)
    recompute_activations(model, training.activation_checkpointing)
    if training.compile:
        compile_blocks(model, cache_folder(config.cache, environment), environment.variables)
    if training.data.mask_documents:
        model.document_end = end_of_document(data.tokenizer)
    optimizer = build_optimizer(model, training.optimizer, training.exact)
    return BuiltModel(shape, rows, model, groups, optimizer, parameters)


def _embedding_rows(shape: ResolvedModel, vocabulary: int, training: Training) -> int:
    """Return the rows of the embedding. Raises InvalidInput if the tensor ranks cannot divide them."""
    rows, tensor = shape.embedding_rows(vocabulary), training.parallelism.tensor
    if rows % tensor:
        raise InvalidInput(
            f"training.parallelism.tensor ({tensor}) does not divide the embedding's rows ({rows}): "
            f"set training.model.vocabulary to {round_up(rows, tensor)}"
        )
    return rows


def build_gradients(built: BuiltModel, training: Training) -> Gradients:
    """Choose the reduction of gradients for the layout."""
    model, groups = built.model, built.groups
    micro_batches = training.batch.sequences // training.batch.micro_batch
    if training.exact and groups.sharded:
        return ExactShardedGradients(model, micro_batches, groups.mesh.shards, groups.group(REPLICATE))
    if not groups.mesh.plain or training.parallelism.shard == "hybrid":
        return MeshGradients(model, groups)
    if training.parallelism.shard == "full":
        return ShardedGradients(model)
    if training.exact:
        return ExactGradients(model.parameters(), micro_batches)
    return FlatGradients(model.parameters())


def build_passes(built: BuiltModel, training: Training, ranks: Ranks) -> Passes:
    """Choose the order of forward and backward passes: one process per replica, or a pipeline."""
    model, groups, loss = built.model, built.groups, build_loss(ranks, training)
    group = groups.group(PIPELINE)
    if group is None:
        return SequentialPasses(model, loss, ranks.device, groups.mesh.tensor)
    bf16 = training.precision == "bf16"
    handed_on = torch.bfloat16 if bf16 and groups.sharded else torch.float32  # as FSDP2 keeps the residual stream
    return PipelinedPasses(model, loss, PipelineStage(groups.place, group, ranks.device, handed_on, bf16))


def build_loss(ranks: Ranks, training: Training) -> LossFunction:
    """Return the loss function in the run's precision."""
    objective = Objective.of(training.loss)

    def loss(model: nn.Module, windows: Tensor, hidden: Tensor | None = None, seed: int | None = None) -> Tensor:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            return objective(model, windows, hidden, seed)

    return loss
