"""Putting a run together: everything that the training loop works with, made from the configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from pretrain_api.checkpoint.identity import job_identity
from pretrain_api.checkpoint.lineage import JobIdentity, Origin, manifest_key
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import Restored
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.model import resolve
from pretrain_api.spec.replicas import up_to_unit
from pretrain_api.spec.schedule import LearningRates
from pretrain_api.spec.support import training_errors
from pretrain_api.spec.training import Training
from pretrain_sdk.rank_link import AgentLink
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.core.mesh import Mesh
from pretrain_trainer.core.progress import Progress
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.core.stage_timer import StageTimer
from pretrain_trainer.core.waits import ObstacleRetry
from pretrain_trainer.datasets.corpus import Batches, Corpus
from pretrain_trainer.datasets.prefetch import FetchedBatches
from pretrain_trainer.datasets.remote_sources import cache_folder
from pretrain_trainer.evaluation.held_out import HeldOut
from pretrain_trainer.hf.initial_weights import Beginning
from pretrain_trainer.loop.run_data import OpenedData
from pretrain_trainer.loop.save_policy import Checkpointer, Saves
from pretrain_trainer.models.activation_checkpointing import recompute_activations
from pretrain_trainer.models.compile import compile_blocks
from pretrain_trainer.models.decoder import Decoder, skeleton
from pretrain_trainer.models.document_mask import end_of_document
from pretrain_trainer.models.loss import Objective
from pretrain_trainer.models.optimizer import build_optimizer
from pretrain_trainer.observability.mfu import Utilization
from pretrain_trainer.parallelism.exact import ExactGradients, ExactShardedGradients
from pretrain_trainer.parallelism.forward_backward import InTurn, Loss, Passes
from pretrain_trainer.parallelism.gradients import FlatGradients, Gradients, ShardedGradients
from pretrain_trainer.parallelism.mesh_gradients import MeshGradients
from pretrain_trainer.parallelism.parallelize import PIPELINE, REPLICATE, Groups, initialise_part, lay_out
from pretrain_trainer.parallelism.pipeline import Pipelined, Stage
from pretrain_trainer.stability.guard import Guard

OpenCheckpointer = Callable[[TrainerConfig, JobIdentity, Generation | None, Ranks, Mapping[str, str]], Checkpointer]


@dataclass(frozen=True)
class Run:
    """All parts of a run, ready to go on from `start`."""

    training: Training
    ranks: Ranks
    link: AgentLink
    steps: int
    rates: LearningRates
    step_tokens: int
    batches: Batches | FetchedBatches
    held_out: tuple[HeldOut, ...]
    tokenizer: Tokenizer
    model: Decoder
    passes: Passes
    dropout: bool
    nan_steps: frozenset[int]
    optimizer: torch.optim.Optimizer
    gradients: Gradients
    checkpointer: Checkpointer
    saves: Saves
    utilization: Utilization
    waiting: ObstacleRetry
    start: Progress
    guard: Guard
    begin_anew: Callable[[], None]
    """Gives model and optimizer the state that they had before the first step. Collective."""


@dataclass(frozen=True)
class _Claim:
    """A place in the history of checkpoints, and what the first weights come from where they are not drawn."""

    checkpointer: Checkpointer
    beginning: Beginning | None

    @property
    def anew(self) -> bool:
        """Nothing is gone on from."""
        return self.checkpointer.parent is None


@dataclass(frozen=True)
class _Built:
    """The model laid over the ranks, and its optimizer."""

    model: Decoder
    groups: Groups
    optimizer: torch.optim.Optimizer
    parameters: int
    """Of the whole model."""


def prepare(
    config: TrainerConfig,
    link: AgentLink,
    ranks: Ranks,
    open_checkpointer: OpenCheckpointer,
    environ: Mapping[str, str],
) -> Run:
    """Open the data, claim the generation, build the model, restore it, and say so. Collective."""
    training = config.training
    check_supported(training)
    ranks = replace(ranks, mesh=Mesh.of(training.parallelism, ranks.world_size, ranks.worker_size))
    torch.set_num_threads(config.threads)
    stages, waiting = StageTimer(), ObstacleRetry(link, ranks.first, Collectives(None), time.sleep)
    first_of_job = link.generation is None or link.generation.may_take_over

    data = OpenedData.of(config, waiting, environ)
    stages.done("data")
    claim = _claim(config, data, link.generation, ranks, open_checkpointer, environ)
    stages.done("open")
    built = _build(config, data, ranks, environ, anew=claim.anew)
    stages.done("model")
    start, origin = _restore(config, claim, built, waiting)
    stages.done("restore")
    held_out = data.held_out()
    # Only a first generation computes the unigram loss: others are in a hurry.
    unigram = data.unigram_loss(wanted=ranks.first and (start.step == 0 or first_of_job))
    stages.done("held-out")

    if ranks.first:
        link.report(_restored(start, claim.checkpointer, origin, built.parameters, unigram, stages.seconds))
    return _put_together(config, link, ranks, data, claim, built, start, held_out, environ)


def _claim(
    config: TrainerConfig,
    data: OpenedData,
    generation: Generation | None,
    ranks: Ranks,
    open_checkpointer: OpenCheckpointer,
    environ: Mapping[str, str],
) -> _Claim:
    """Enter the history of the job's checkpoints, having made sure that there is something to begin from."""
    training, corpus = config.training, data.corpus
    datasets = [source.dataset for source in corpus.sources]
    identity = job_identity(training, resolve(training.model), datasets, corpus.tokenizer_digest)
    beginning = Beginning.of(config, identity, corpus.tokenizer, ranks, environ)
    if beginning is not None and (generation is None or generation.may_take_over):
        data.waiting.retry_until_clear(beginning.check)  # before anything is written
    opened = data.waiting.retry_until_clear(lambda: open_checkpointer(config, identity, generation, ranks, environ))
    return _Claim(opened, beginning)


def _build(config: TrainerConfig, data: OpenedData, ranks: Ranks, environ: Mapping[str, str], *, anew: bool) -> _Built:
    """The model and its optimizer; its values are set where it starts `anew`, else a restore does that."""
    training, shape = config.training, resolve(config.training.model)
    assert ranks.mesh is not None  # set by `prepare`
    groups = Groups.over(ranks.mesh, ranks, training.parallelism.shard != "none", shape.tied_head)
    model = skeleton(shape, _rows(data.corpus, training))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lay_out(model, groups, training.precision == "bf16", training.exact)
    model.to_empty(device=ranks.device)
    if anew:
        initialise_part(model, training.seed)
    recompute_activations(model, training.activation_checkpointing)
    if training.compile:
        compile_blocks(model, cache_folder(config.cache, environ), environ)
    if training.data.mask_documents:
        model.document_end = end_of_document(data.tokenizer)
    return _Built(model, groups, build_optimizer(model, training.optimizer, training.exact), parameters)


def _restore(
    config: TrainerConfig, claim: _Claim, built: _Built, waiting: ObstacleRetry
) -> tuple[Progress, Origin | None]:
    """(the progress to go on from, where else the first weights were taken from)."""
    start = waiting.retry_until_clear(lambda: claim.checkpointer.restore(built.model, built.optimizer))
    if claim.beginning is None or not claim.anew or start.step:
        return start, None
    load, shape = claim.beginning.load, resolve(config.training.model)
    return start, waiting.retry_until_clear(lambda: load(built.model, built.optimizer, shape))


def _begin_anew(config: TrainerConfig, claim: _Claim, built: _Built, waiting: ObstacleRetry) -> None:
    """Give model and optimizer the state that they had before the first step. Collective."""
    built.optimizer.state.clear()
    initialise_part(built.model, config.training.seed)
    if claim.beginning is not None:
        load, shape = claim.beginning.load, resolve(config.training.model)
        waiting.retry_until_clear(lambda: load(built.model, built.optimizer, shape))


def _put_together(
    config: TrainerConfig,
    link: AgentLink,
    ranks: Ranks,
    data: OpenedData,
    claim: _Claim,
    built: _Built,
    start: Progress,
    held_out: tuple[HeldOut, ...],
    environ: Mapping[str, str],
) -> Run:
    training, shape, waiting = config.training, resolve(config.training.model), data.waiting
    model, optimizer, groups, checkpointer = built.model, built.optimizer, built.groups, claim.checkpointer
    batches = Batches(data.corpus, training, shape.context)
    rows = shape.embedding_rows(data.corpus.vocabulary)
    interval, memory = config.checkpoint.interval, config.checkpoint.memory
    return Run(
        training=training,
        ranks=ranks,
        link=link,
        steps=training.total_steps,
        rates=LearningRates.of(training),
        step_tokens=training.batch.sequences * shape.context,
        batches=FetchedBatches(batches, waiting, time.monotonic) if data.remote else batches,
        held_out=held_out,
        tokenizer=data.tokenizer,
        model=model,
        passes=_passes(model, _loss(ranks, training), groups, training, ranks),
        dropout=shape.dropout > 0,
        nan_steps=frozenset(config.nan_steps),
        optimizer=optimizer,
        gradients=_gradients(model, training, groups),
        checkpointer=checkpointer,
        saves=Saves(checkpointer, model, optimizer, interval, time.monotonic, memory),
        utilization=Utilization.of(shape, rows, training.precision, ranks, link.generation, environ),
        waiting=waiting,
        start=start,
        guard=Guard(config.divergence, training.total_steps, link, speaks=ranks.first),
        begin_anew=partial(_begin_anew, config, claim, built, waiting),
    )


def check_supported(training: Training) -> None:
    """Raise InvalidInput for what the API has and this trainer has not."""
    for finding in training_errors(training):
        raise InvalidInput(f"{finding.path.removeprefix('spec.')}: {finding.message}")


def _rows(corpus: Corpus, training: Training) -> int:
    """Rows of the embedding. Raises InvalidInput if tensor ranks cannot share them."""
    rows, tensor = resolve(training.model).embedding_rows(corpus.vocabulary), training.parallelism.tensor
    if rows % tensor:
        raise InvalidInput(
            f"training.parallelism.tensor ({tensor}) does not divide the embedding's rows ({rows}): "
            f"set training.model.vocabulary to {up_to_unit(rows, tensor)}"
        )
    return rows


def _gradients(model: Decoder, training: Training, groups: Groups) -> Gradients:
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


def _passes(model: Decoder, loss: Loss, groups: Groups, training: Training, ranks: Ranks) -> Passes:
    group = groups.group(PIPELINE)
    if group is None:
        return InTurn(model, loss, ranks.device, groups.mesh.tensor)
    bf16 = training.precision == "bf16"
    handed_on = torch.bfloat16 if bf16 and groups.sharded else torch.float32  # as FSDP2 keeps the residual stream
    return Pipelined(model, loss, Stage(groups.place, group, ranks.device, handed_on, bf16))


def _loss(ranks: Ranks, training: Training) -> Loss:
    objective = Objective.of(training.loss)

    def loss(model: nn.Module, windows: Tensor, hidden: Tensor | None = None, seed: int | None = None) -> Tensor:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            return objective(model, windows, hidden, seed)

    return loss


def _restored(
    start: Progress,
    checkpointer: Checkpointer,
    origin: Origin | None,
    parameters: int,
    unigram: float | None,
    seconds: dict[str, float],
) -> Restored:
    """The report of a run that stands."""
    parent = checkpointer.parent
    return Restored(
        step=start.step,
        checkpoint=manifest_key(parent.generation, parent.step) if parent else None,
        origin=str(origin) if origin else None,
        recalled=checkpointer.recalled,
        steps=start.lately,
        parameters=parameters,
        unigram_loss=unigram,
        skipped=start.skipped,
        rollbacks=checkpointer.rollbacks,
        seconds=seconds,
    )
