"""The data of a run, opened: its corpus and tokeniser, and what is read of them at the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self, TypeVar

from tokenizers import Tokenizer

from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.model import resolve
from pretrain_api.spec.training import Training
from pretrain_store.open import is_remote
from pretrain_trainer.core.waits import ObstacleRetry
from pretrain_trainer.datasets.corpus import Corpus, open_corpus
from pretrain_trainer.datasets.remote_sources import Sources
from pretrain_trainer.datasets.unigram import unigram_loss
from pretrain_trainer.evaluation.held_out import HeldOut, read_held_out
from pretrain_trainer.evaluation.sampling import parse_tokenizer

Value = TypeVar("Value")


@dataclass(frozen=True)
class OpenedData:
    """What a run reads."""

    training: Training
    corpus: Corpus
    tokenizer: Tokenizer
    waiting: ObstacleRetry
    remote: bool
    """Some of it is in S3, and may have to be waited for."""

    @classmethod
    def of(cls, config: TrainerConfig, waiting: ObstacleRetry, environ: Mapping[str, str]) -> Self:
        """That of a job, once nothing is in the way. Raises InvalidInput. Collective."""
        training, sources, remote = config.training, Sources.of(config, environ), _remote(config.training)
        corpus = _reading(waiting, remote)(lambda: open_corpus(training, resolve(training.model), sources.locate))
        return cls(training, corpus, parse_tokenizer(corpus.tokenizer), waiting, remote)

    def held_out(self) -> tuple[HeldOut, ...]:
        """What is evaluated on. Collective."""
        evaluation, context = self.training.evaluation, resolve(self.training.model).context
        if evaluation is None:
            return ()
        sources, micro_batch = self.corpus.held_out, self.training.batch.micro_batch
        return self._read(lambda: read_held_out(sources, evaluation.sequences, micro_batch, context))

    def unigram_loss(self, *, wanted: bool) -> float | None:
        """That of the training mix, on ranks that want it. Collective."""
        weights = [source.weight for source in self.training.data.sources]
        corpus = self.corpus
        return self._read(lambda: unigram_loss(corpus.sources, weights, corpus.vocabulary) if wanted else None)

    def _read(self, act: Callable[[], Value]) -> Value:
        return _reading(self.waiting, self.remote)(act)


def _reading(waiting: ObstacleRetry, remote: bool) -> Callable[[Callable[[], Value]], Value]:
    """How what reads is called: where each rank fetches for itself, until all of them could."""
    return waiting.retry_on_all_ranks if remote else waiting.retry_until_clear


def _remote(training: Training) -> bool:
    evaluation = training.evaluation.sources if training.evaluation else ()
    uris = (training.data.tokenizer, *(source.uri for source in (*training.data.sources, *evaluation)))
    return any(is_remote(uri) for uri in uris)
