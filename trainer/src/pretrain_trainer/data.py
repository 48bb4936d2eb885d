"""Tokenised sources on disk: shards mapped into memory, read as windows of context + 1 tokens.

Windows follow each other with stride `context`, so that the last token of one is the first of the next and every
token but the first of a shard is a target once. A window never crosses from one shard to the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from pretrain_api.dataset import DATASET_FILE, Dataset, Shard
from pretrain_api.lineage import StepRange
from pretrain_api.model import ResolvedModel
from pretrain_api.training import Source, Training
from pretrain_trainer.errors import InvalidInput
from pretrain_trainer.order import MixSource, Order

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


class TokenSource:
    """One source: its shards, seen as numbered windows."""

    def __init__(self, name: str, dataset: Dataset, shards: Sequence[Tokens], context: int) -> None:
        self.name = name
        self.dataset = dataset
        self.shards = shards
        self._context = context
        counts = [max(0, (len(shard) - 1) // context) for shard in shards]
        self._ends = np.cumsum(counts)
        self._begins = self._ends - counts

    @property
    def windows(self) -> int:
        """Number of windows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, window: int, into: NDArray[np.int64]) -> None:
        """Copy a window's context + 1 tokens."""
        shard = int(np.searchsorted(self._ends, window, side="right"))
        begin = (window - int(self._begins[shard])) * self._context
        into[:] = self.shards[shard][begin : begin + self._context + 1]


@dataclass(frozen=True)
class Corpus:
    """All data of a run, found to fit together."""

    sources: tuple[TokenSource, ...]
    held_out: tuple[TokenSource, ...]
    tokenizer: bytes

    @property
    def vocabulary(self) -> int:
        """Size of the tokeniser's vocabulary."""
        return self.sources[0].dataset.vocabulary

    @property
    def tokenizer_digest(self) -> str:
        """sha256 of tokenizer.json."""
        return hashlib.sha256(self.tokenizer).hexdigest()


class Batches:
    """Reads the micro-batches of training steps."""

    def __init__(self, corpus: Corpus, training: Training, context: int) -> None:
        mix = [
            MixSource(source.name, source.weight, tokens.windows)
            for source, tokens in zip(training.data.sources, corpus.sources, strict=True)
        ]
        self._order = Order(mix, training.batch.sequences, training.seed)
        self._sources = corpus.sources
        self._micro_batch = training.batch.micro_batch
        self._context = context
        self.filler = torch.zeros(self._micro_batch, context + 1, dtype=torch.int64)
        """A micro-batch of no meaning, for passes of weight zero."""

    def of_step(self, step: int, skipped: Sequence[StepRange], share: range) -> list[Tensor]:
        """The micro-batches `share` of a step, each (micro_batch, context + 1) of int64."""
        part = range(share.start * self._micro_batch, share.stop * self._micro_batch)
        sequences = self._order.of_step(step, skipped, part)
        windows = np.empty((len(part), self._context + 1), dtype=np.int64)
        for row, source, window in zip(windows, sequences.sources.tolist(), sequences.windows.tolist(), strict=True):
            self._sources[source].read(window, row)
        return list(torch.from_numpy(windows).split(self._micro_batch)) if len(part) else []


def open_corpus(training: Training, shape: ResolvedModel) -> Corpus:
    """Map all sources. Raises InvalidInput when something is missing or does not fit together."""
    context = shape.context
    sources = tuple(
        open_source(source, context, f"training.data.sources[{source.name}]") for source in training.data.sources
    )
    evaluation = training.evaluation.sources if training.evaluation else ()
    held_out = tuple(
        open_source(source, context, f"training.evaluation.sources[{source.name}]") for source in evaluation
    )
    corpus = Corpus(sources, held_out, _read(training.data.tokenizer, "training.data.tokenizer"))
    for source in (*sources, *held_out):
        _check_tokens(source, corpus, shape)
    return corpus


def open_source(source: Source, context: int, field: str) -> TokenSource:
    """Map one source's shards; `field` names it in errors."""
    folder = _local(source.uri, f"{field}.uri")
    try:
        dataset = Dataset.from_json(_read(source.uri, f"{field}.uri", DATASET_FILE))
    except ValidationError as error:
        raise InvalidInput(
            f"{field}.uri: {folder / DATASET_FILE} is no dataset description ({error.errors()[0]['msg']}): "
            "make the data anew"
        ) from error
    shards = [_map_shard(folder, shard, dataset.dtype, field) for shard in dataset.shards if shard.tokens]
    opened = TokenSource(source.name, dataset, shards, context)
    if opened.windows == 0:
        raise InvalidInput(
            f"{field}: no shard in {folder} has the {context + 1} tokens that training.model.context {context} needs: "
            "lower the context or give more data"
        )
    return opened


def _check_tokens(source: TokenSource, corpus: Corpus, shape: ResolvedModel) -> None:
    vocabulary = source.dataset.vocabulary
    if source.dataset.tokenizer_digest != corpus.tokenizer_digest:
        raise InvalidInput(
            f"source {source.name} was made with another tokeniser than training.data.tokenizer: "
            "name the tokeniser that made it, or make the data anew"
        )
    if shape.vocabulary is not None and shape.vocabulary < vocabulary:
        raise InvalidInput(
            f"training.model.vocabulary ({shape.vocabulary}) is smaller than the tokeniser's ({vocabulary}): "
            "raise it or leave it out"
        )
    if vocabulary != corpus.vocabulary:
        raise InvalidInput(
            f"source {source.name} says that the vocabulary has {vocabulary} tokens, source "
            f"{corpus.sources[0].name} says {corpus.vocabulary}: make the data anew"
        )


def _map_shard(folder: Path, shard: Shard, dtype: str, field: str) -> Tokens:
    path = folder / shard.name
    kind = np.dtype(dtype).newbyteorder("<")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InvalidInput(f"{field}.uri: shard {path} cannot be read ({error.strerror}): restore it") from error
    if size != shard.tokens * kind.itemsize:
        raise InvalidInput(
            f"{field}.uri: shard {path} has {size} bytes where {DATASET_FILE} says {shard.tokens * kind.itemsize}: "
            "it is truncated or was replaced; copy or make it anew"
        )
    return np.memmap(path, dtype=kind, mode="r")


def _read(uri: str, field: str, name: str = "") -> bytes:
    path = _local(uri, field) / name
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{field}: {path} cannot be read ({error.strerror}): correct the path") from error


def _local(uri: str, field: str) -> Path:
    parsed = urlparse(uri)
    if parsed.scheme not in ("", "file"):
        raise InvalidInput(
            f"{field}: data is read from folders only, not from {parsed.scheme}://: copy it to a folder or a volume, "
            "and name that"
        )
    return Path(unquote(parsed.path) if parsed.scheme else uri)
