"""Putting a run together: everything that the training loop works with, made from the configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from pretrain_agent.client import AgentLink
from pretrain_api.identity import job_identity
from pretrain_api.layout import up_to_unit
from pretrain_api.lineage import JobIdentity, Origin, manifest_key
from pretrain_api.model import resolve
from pretrain_api.protocol import Generation
from pretrain_api.reports import Restored
from pretrain_api.schedule import LearningRates
from pretrain_api.support import training_errors
from pretrain_api.trainer import TrainerConfig
from pretrain_api.training import Training
from pretrain_store.open import is_remote
from pretrain_trainer.beginning import Beginning
from pretrain_trainer.checkpoint.agreement import Agreement
from pretrain_trainer.compiling import compile_blocks
from pretrain_trainer.data import Batches, Corpus, open_corpus
from pretrain_trainer.documents import end_of_document
from pretrain_trainer.errors import InvalidInput
from pretrain_trainer.evaluation import HeldOut, read_held_out
from pretrain_trainer.exact import ExactGradients, ExactShardedGradients
from pretrain_trainer.gradients import FlatGradients, Gradients, ShardedGradients
from pretrain_trainer.guard import Guard
from pretrain_trainer.lookahead import FetchedBatches
from pretrain_trainer.mesh import Mesh
from pretrain_trainer.mesh_gradients import MeshGradients
from pretrain_trainer.model import Decoder, skeleton
from pretrain_trainer.objective import Objective
from pretrain_trainer.optimizer import build_optimizer
from pretrain_trainer.parallel import PIPELINE, Groups, initialise_part, lay_out
from pretrain_trainer.passes import InTurn, Loss, Passes
from pretrain_trainer.pipeline import Pipelined, Stage
from pretrain_trainer.progress import Progress
from pretrain_trainer.ranks import Ranks
from pretrain_trainer.recompute import recompute_activations
from pretrain_trainer.remote import Sources, cache_folder
from pretrain_trainer.sampling import parse_tokenizer
from pretrain_trainer.saving import Checkpointer, Saves
from pretrain_trainer.stages import Stages
from pretrain_trainer.unigram import unigram_loss
from pretrain_trainer.utilization import Utilization
from pretrain_trainer.waiting import Waiting

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
    waiting: Waiting
    start: Progress
    guard: Guard
    begin_anew: Callable[[], None]
    """Gives model and optimizer the state that they had before the first step. Collective."""


def prepare(
    config: TrainerConfig,
    link: AgentLink,
    ranks: Ranks,
    open_checkpointer: OpenCheckpointer,
    environ: Mapping[str, str],
) -> Run:
    """Open the data, claim the generation, build the model, restore it, and say so. Collective."""
    training, shape = config.training, resolve(config.training.model)
    check_supported(training)
    mesh = Mesh.of(training.parallelism, ranks.world_size, ranks.worker_size)
    ranks = replace(ranks, mesh=mesh)
    stages = Stages()
    torch.set_num_threads(config.threads)

    waiting = Waiting(link, ranks.first, Agreement(None), time.sleep)
    remote, sources = _remote(training), Sources.of(config, environ)
    each = waiting.together if remote else waiting.until_clear
    corpus = each(lambda: open_corpus(training, shape, sources.locate))
    tokenizer = parse_tokenizer(corpus.tokenizer)
    stages.done("data")

    datasets = [source.dataset for source in corpus.sources]
    identity = job_identity(training, shape, datasets, corpus.tokenizer_digest)
    beginning = Beginning.of(config, identity, corpus.tokenizer, ranks, environ)
    if beginning is not None and (link.generation is None or link.generation.may_take_over):
        waiting.until_clear(beginning.check)  # before anything is written
    checkpointer = waiting.until_clear(lambda: open_checkpointer(config, identity, link.generation, ranks, environ))
    stages.done("open")

    sharded = training.parallelism.shard != "none"
    groups = Groups.over(mesh, ranks, sharded, shape.tied_head)
    model = skeleton(shape, _rows(corpus, training))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lay_out(model, groups, training.precision == "bf16")
    model.to_empty(device=ranks.device)
    if checkpointer.parent is None:
        initialise_part(model, training.seed)
    recompute_activations(model, training.activation_checkpointing)
    if training.compile:
        compile_blocks(model, cache_folder(config.cache, environ), environ)
    if training.data.mask_documents:
        model.document_end = end_of_document(tokenizer)
    optimizer = build_optimizer(model, training.optimizer, training.exact)
    stages.done("model")

    start = waiting.until_clear(lambda: checkpointer.restore(model, optimizer))
    origin = None
    if beginning is not None and checkpointer.parent is None and not start.step:
        origin = waiting.until_clear(partial(beginning.load, model, optimizer, shape))
    stages.done("restore")

    def begin_anew() -> None:
        optimizer.state.clear()
        initialise_part(model, training.seed)
        if beginning is not None:
            waiting.until_clear(partial(beginning.load, model, optimizer, shape))

    held_out = each(lambda: _held_out(corpus, training, shape.context))
    # Only a first generation computes the unigram loss: others are in a hurry.
    fresh = ranks.first and (start.step == 0 or link.generation is None or link.generation.may_take_over)
    unigram = each(lambda: _unigram_loss(corpus, training) if fresh else None)
    stages.done("held-out")
    if ranks.first:
        link.report(_restored(start, checkpointer, origin, parameters, unigram, stages.seconds))
    batches = Batches(corpus, training, shape.context)
    return Run(
        training=training,
        ranks=ranks,
        link=link,
        steps=training.total_steps,
        rates=LearningRates.of(training),
        step_tokens=training.batch.sequences * shape.context,
        batches=FetchedBatches(batches, waiting, time.monotonic) if remote else batches,
        held_out=held_out,
        tokenizer=tokenizer,
        model=model,
        passes=_passes(model, _loss(ranks, training), groups, training, ranks),
        dropout=shape.dropout > 0,
        nan_steps=frozenset(config.nan_steps),
        optimizer=optimizer,
        gradients=_gradients(model, training, groups, ranks),
        checkpointer=checkpointer,
        saves=Saves(
            checkpointer, model, optimizer, config.checkpoint.interval, time.monotonic, config.checkpoint.memory
        ),
        utilization=Utilization.of(
            shape, shape.embedding_rows(corpus.vocabulary), training.precision, ranks, link.generation, environ
        ),
        waiting=waiting,
        start=start,
        guard=Guard(config.divergence, training.total_steps, link, speaks=ranks.first),
        begin_anew=begin_anew,
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


def _gradients(model: Decoder, training: Training, groups: Groups, ranks: Ranks) -> Gradients:
    micro_batches = training.batch.sequences // training.batch.micro_batch
    if not groups.mesh.plain or training.parallelism.shard == "hybrid":
        return MeshGradients(model, groups)
    if training.parallelism.shard == "full":
        if training.exact:
            return ExactShardedGradients(model, micro_batches, ranks.world_size)
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

    def loss(model: nn.Module, windows: Tensor, hidden: Tensor | None = None) -> Tensor:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            return objective(model, windows, hidden)

    return loss


def _held_out(corpus: Corpus, training: Training, context: int) -> tuple[HeldOut, ...]:
    if training.evaluation is None:
        return ()
    return read_held_out(corpus.held_out, training.evaluation.sequences, training.batch.micro_batch, context)


def _remote(training: Training) -> bool:
    """Whether anything is read from S3, and may have to be waited for."""
    evaluation = training.evaluation.sources if training.evaluation else ()
    uris = (training.data.tokenizer, *(source.uri for source in (*training.data.sources, *evaluation)))
    return any(is_remote(uri) for uri in uris)


def _unigram_loss(corpus: Corpus, training: Training) -> float:
    return unigram_loss(corpus.sources, [source.weight for source in training.data.sources], corpus.vocabulary)


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
        parameters=parameters,
        unigram_loss=unigram,
        skipped=start.skipped,
        rollbacks=checkpointer.rollbacks,
        seconds=seconds,
    )
