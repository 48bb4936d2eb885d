"""Data of a run: the opened corpus and tokeniser, and the reads at the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

from tokenizers import Tokenizer

from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.model import ResolvedModel
from pretrain_api.spec.training import Training
from pretrain_store.open import is_remote
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.waits import ObstacleRetry
from pretrain_trainer.datasets.corpus import Corpus, open_corpus
from pretrain_trainer.datasets.remote_sources import Sources
from pretrain_trainer.datasets.unigram import unigram_loss
from pretrain_trainer.evaluation.held_out import HeldOut, read_held_out
from pretrain_trainer.evaluation.sampling import parse_tokenizer

Value = TypeVar("Value")


@dataclass(frozen=True)
class OpenedData:
    """Sources, held-out sources and tokeniser of a run."""

    training: Training
    corpus: Corpus
    tokenizer: Tokenizer
    retry: ObstacleRetry
    remote: bool
    """True where some of it is in S3 and each rank fetches for itself."""

    @classmethod
    def of(cls, config: TrainerConfig, model: ResolvedModel, retry: ObstacleRetry, environment: Environment) -> Self:
        """Open the data of a job, waiting for obstacles. Collective. Raises InvalidInput."""
        training, sources, remote = config.training, Sources.of(config, environment), _remote(config.training)
        corpus = _retried(retry, remote)(lambda: open_corpus(training, model, sources.locate))
        return cls(training, corpus, parse_tokenizer(corpus.tokenizer), retry, remote)

    def held_out(self, context: int) -> tuple[HeldOut, ...]:
        """Read the windows of the evaluation's sources. Collective."""
        evaluation = self.training.evaluation
        if evaluation is None:
            return ()
        sources, micro_batch = self.corpus.held_out, self.training.batch.micro_batch
        return self._read(lambda: read_held_out(sources, evaluation.sequences, micro_batch, context))

    def unigram_loss(self, *, wanted: bool) -> float | None:
        """Compute the unigram loss of the training mix on ranks that want it. Collective."""
        weights = [source.weight for source in self.training.data.sources]
        corpus = self.corpus
        return self._read(lambda: unigram_loss(corpus.sources, weights, corpus.vocabulary) if wanted else None)

    def _read(self, act: Callable[[], Value]) -> Value:
        return _retried(self.retry, self.remote)(act)


def _retried(retry: ObstacleRetry, remote: bool) -> Callable[[Callable[[], Value]], Value]:
    """Return the retry for reads: where each rank fetches for itself, obstacles may differ between ranks."""
    return retry.retry_on_all_ranks if remote else retry.retry_until_clear


def _remote(training: Training) -> bool:
    evaluation = training.evaluation.sources if training.evaluation else ()
    uris = (training.data.tokenizer, *(source.uri for source in (*training.data.sources, *evaluation)))
    return any(is_remote(uri) for uri in uris)
