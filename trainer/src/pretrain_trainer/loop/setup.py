"""Set-up of a run: opens the data, joins the lineage, builds the model and restores its state."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from pretrain_api.checkpoint.identity import job_identity
from pretrain_api.checkpoint.lineage import JobIdentity, Origin, manifest_key
from pretrain_api.messages.protocol import Generation
from pretrain_api.messages.reports import Restored
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.model import ResolvedModel, resolve
from pretrain_api.spec.schedule import LearningRates
from pretrain_api.spec.support import training_errors
from pretrain_api.spec.training import Training
from pretrain_sdk.rank_link import AgentLink
from pretrain_trainer.core.collectives import Collectives
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.core.mesh import Mesh
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import Ranks
from pretrain_trainer.core.stage_timer import StageTimer
from pretrain_trainer.core.waits import ObstacleRetry
from pretrain_trainer.datasets.corpus import Batches
from pretrain_trainer.datasets.prefetch import FetchedBatches
from pretrain_trainer.evaluation.held_out import HeldOut
from pretrain_trainer.evaluation.trained_model import EvaluatedModel
from pretrain_trainer.hf.initial_weights import InitialWeights
from pretrain_trainer.loop.build import BuiltModel, build_gradients, build_model, build_passes
from pretrain_trainer.loop.rollback import InPlaceRollback
from pretrain_trainer.loop.run_data import OpenedData
from pretrain_trainer.loop.save_policy import SavePolicy
from pretrain_trainer.loop.step import OptimizerStep
from pretrain_trainer.loop.step_saves import CheckpointerPort, StepSaves
from pretrain_trainer.observability.mfu import Utilization
from pretrain_trainer.observability.step_report import StepRecorder
from pretrain_trainer.observability.step_timing import StepTimer, marks_on
from pretrain_trainer.parallelism.parallelize import initialise_part
from pretrain_trainer.stability.guard import DivergenceGuard

OpenCheckpointer = Callable[[TrainerConfig, JobIdentity, Generation | None, Ranks, Mapping[str, str]], CheckpointerPort]


@dataclass(frozen=True)
class PreparedRun:
    """The parts of a run, each with what it needs, ready to resume from `start`. Only `train` sees all of them."""

    ranks: Ranks
    total_steps: int
    start: TrainingProgress
    step: OptimizerStep
    guard: DivergenceGuard
    rollback: InPlaceRollback
    checkpointer: CheckpointerPort
    saves: StepSaves
    timer: StepTimer
    recorder: StepRecorder
    evaluated: EvaluatedModel
    held_out: tuple[HeldOut, ...]
    retry: ObstacleRetry


@dataclass(frozen=True)
class Setup:
    """Inputs of all parts of the set-up."""

    config: TrainerConfig
    shape: ResolvedModel
    link: AgentLink
    ranks: Ranks
    retry: ObstacleRetry
    environment: Environment

    @classmethod
    def of(cls, config: TrainerConfig, link: AgentLink, ranks: Ranks, environment: Environment) -> Setup:
        """Check the configuration and lay out the ranks. Raises InvalidInput."""
        check_supported(config.training)
        mesh = Mesh.of(config.training.parallelism, ranks.world_size, ranks.worker_size)
        retry = ObstacleRetry(link, ranks.first, Collectives(None), time.sleep)
        return cls(config, resolve(config.training.model), link, replace(ranks, mesh=mesh), retry, environment)

    @property
    def first_of_job(self) -> bool:
        """True in a job's first generation, and in a run without generations."""
        return self.link.generation is None or self.link.generation.may_take_over


@dataclass(frozen=True)
class JoinedLineage:
    """The opened checkpoints of this generation, and the source of initial weights, if not the seed."""

    checkpointer: CheckpointerPort
    initial_weights: InitialWeights | None


def prepare(
    config: TrainerConfig,
    link: AgentLink,
    ranks: Ranks,
    open_checkpointer: OpenCheckpointer,
    environment: Environment,
) -> PreparedRun:
    """Open the data, join the lineage, build the model, restore it, and report `Restored`. Collective."""
    setup, stages = Setup.of(config, link, ranks, environment), StageTimer()
    torch.set_num_threads(config.threads)
    data = OpenedData.of(config, setup.shape, setup.retry, environment)
    stages.done("data")
    lineage = _join_lineage(setup, data, open_checkpointer)
    stages.done("open")
    fresh = lineage.checkpointer.parent is None
    built = build_model(config, setup.shape, data, setup.ranks, environment, initialise=fresh)
    stages.done("model")
    start, origin = _restore(setup, lineage, built)
    stages.done("restore")
    held_out = data.held_out(setup.shape.context)
    # Only a first generation computes the unigram loss: later ones are part of a recovery.
    unigram = data.unigram_loss(wanted=ranks.first and (start.step == 0 or setup.first_of_job))
    stages.done("held-out")
    if ranks.first:
        link.report(_restored(start, lineage.checkpointer, origin, built.parameters, unigram, stages.seconds))
    return _assemble(setup, data, lineage, built, start, held_out)


def _join_lineage(setup: Setup, data: OpenedData, open_checkpointer: OpenCheckpointer) -> JoinedLineage:
    """Check the source of initial weights, then put this generation's lineage record. Collective."""
    config, corpus, generation = setup.config, data.corpus, setup.link.generation
    ranks, variables = setup.ranks, setup.environment.variables
    datasets = [source.dataset for source in corpus.sources]
    identity = job_identity(config.training, setup.shape, datasets, corpus.tokenizer_digest)
    weights = InitialWeights.of(config, identity, corpus.tokenizer, ranks, variables)
    if weights is not None and setup.first_of_job:
        setup.retry.retry_until_clear(weights.check)  # before anything is written
    opened = setup.retry.retry_until_clear(lambda: open_checkpointer(config, identity, generation, ranks, variables))
    return JoinedLineage(opened, weights)


def _restore(setup: Setup, lineage: JoinedLineage, built: BuiltModel) -> tuple[TrainingProgress, Origin | None]:
    """Load the latest state; return its progress, and the origin of initial weights where those were loaded."""
    checkpointer, weights = lineage.checkpointer, lineage.initial_weights
    start = setup.retry.retry_until_clear(lambda: checkpointer.restore(built.model, built.optimizer))
    if weights is None or checkpointer.parent is not None or start.step:
        return start, None
    return start, setup.retry.retry_until_clear(lambda: weights.load(built.model, built.optimizer, built.shape))


def _reinitialise(setup: Setup, weights: InitialWeights | None, built: BuiltModel) -> None:
    """Set model and optimizer to their state before the first step. Collective."""
    built.optimizer.state.clear()
    initialise_part(built.model, setup.config.training.seed)
    if weights is not None:
        setup.retry.retry_until_clear(lambda: weights.load(built.model, built.optimizer, built.shape))


def _assemble(
    setup: Setup,
    data: OpenedData,
    lineage: JoinedLineage,
    built: BuiltModel,
    start: TrainingProgress,
    held_out: tuple[HeldOut, ...],
) -> PreparedRun:
    training, ranks, link = setup.config.training, setup.ranks, setup.link
    model, optimizer, checkpointer = built.model, built.optimizer, lineage.checkpointer
    step = _optimizer_step(setup, data, built)
    policy = SavePolicy(setup.config.checkpoint.interval, setup.config.checkpoint.memory)
    saves = StepSaves(checkpointer, model, optimizer, policy, time.monotonic)
    reinitialise = partial(_reinitialise, setup, lineage.initial_weights, built)
    timer = StepTimer(step.step_tokens, marks_on(ranks.device))
    utilization = Utilization.of(setup.shape, built.rows, training.precision, ranks, link.generation, setup.environment)
    return PreparedRun(
        ranks=ranks,
        total_steps=training.total_steps,
        start=start,
        step=step,
        guard=DivergenceGuard(setup.config.divergence, training.total_steps, link, reports=ranks.first),
        rollback=InPlaceRollback(checkpointer, saves, model, optimizer, reinitialise, setup.retry, link),
        checkpointer=checkpointer,
        saves=saves,
        timer=timer,
        recorder=StepRecorder(ranks, timer, utilization),
        evaluated=EvaluatedModel(
            model, step.passes, data.tokenizer, ranks, training.batch.micro_batch, step.gradients.padded
        ),
        held_out=held_out,
        retry=setup.retry,
    )


def _optimizer_step(setup: Setup, data: OpenedData, built: BuiltModel) -> OptimizerStep:
    training, shape = setup.config.training, setup.shape
    batches = Batches(data.corpus, training, shape.context)
    return OptimizerStep(
        training=training,
        step_tokens=training.batch.sequences * shape.context,
        place=setup.ranks.place,
        batches=FetchedBatches(batches, setup.retry, time.monotonic) if data.remote else batches,
        passes=build_passes(built, training, setup.ranks),
        gradients=build_gradients(built, training),
        optimizer=built.optimizer,
        rates=LearningRates.of(training),
        dropout=shape.dropout > 0,
        nan_steps=frozenset(setup.config.nan_steps),
    )


def check_supported(training: Training) -> None:
    """Raise InvalidInput for settings of the API that this trainer does not support."""
    for finding in training_errors(training):
        raise InvalidInput(f"{finding.path.removeprefix('spec.')}: {finding.message}")


def _restored(
    start: TrainingProgress,
    checkpointer: CheckpointerPort,
    origin: Origin | None,
    parameters: int,
    unigram: float | None,
    seconds: dict[str, float],
) -> Restored:
    """Build the report of a run that is ready to train."""
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
