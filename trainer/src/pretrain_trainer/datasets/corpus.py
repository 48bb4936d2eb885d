"""Tokenised sources: shards mapped into memory, read as windows of context + 1 tokens.

Consecutive windows have stride `context`: the last token of one is the first of the next, and every token of a shard
but the first is a target once. A window never crosses shards.

Shards in folders stay mapped. Shards in S3 (see `remote_sources`) are mapped while a step reads from them, shard by
shard.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from pretrain_api.checkpoint.lineage import StepRange
from pretrain_api.dataset import DATASET_FILE, Dataset, Shard
from pretrain_api.spec.data import Source
from pretrain_api.spec.model import ResolvedModel
from pretrain_api.spec.training import Training
from pretrain_store.open import split_uri
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.datasets.order import DataOrder, MixSource, Sequences

Tokens = NDArray[np.unsignedinteger]
OpenShard = Callable[[], Tokens]
"""Maps a shard; the mapping lasts as long as the returned array."""


class SourceLocation(Protocol):
    """Location of a source or a tokeniser."""

    def read(self, name: str) -> bytes:
        """Read a small file. Raises InvalidInput if it does not exist, or an Obstacle where waiting may help."""
        ...

    def shard(self, shard: Shard, dtype: np.dtype[np.unsignedinteger]) -> OpenShard:
        """Return a shard, opened now or when it is called."""
        ...

    def undescribed(self, why: str) -> Exception:
        """Return the error to raise when DATASET_FILE is no valid description."""
        ...


Locate = Callable[[str, str], SourceLocation]
"""Maps a folder's URI, and the field of the job that names it, to the location."""


class TokenSource:
    """One source: its shards as numbered windows. Shards without tokens are left out."""

    def __init__(self, name: str, dataset: Dataset, shards: Sequence[OpenShard], context: int) -> None:
        self.name = name
        self.dataset = dataset
        self.shards = shards
        self._context = context
        counts = [max(0, (shard.tokens - 1) // context) for shard in dataset.shards if shard.tokens]
        self._ends = np.cumsum(counts)
        self._begins = self._ends - counts

    @property
    def windows(self) -> int:
        """Number of windows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def shards_of(self, windows: NDArray[np.int64]) -> NDArray[np.intp]:
        """Return the shard of each window."""
        return np.searchsorted(self._ends, windows, side="right")

    def read(self, shard: int, windows: NDArray[np.int64], rows: NDArray[np.intp], into: NDArray[np.int64]) -> None:
        """Copy windows of one shard, context + 1 tokens each, to these rows."""
        tokens = self.shards[shard]()
        begins = (windows - self._begins[shard]) * self._context
        for row, begin in zip(rows.tolist(), begins.tolist(), strict=True):
            into[row] = tokens[begin : begin + self._context + 1]


class Reading:
    """A read of sequences into one array, shard by shard; it can be interrupted and continued."""

    def __init__(self, sources: Sequence[TokenSource], sequences: Sequences, context: int) -> None:
        self.windows = np.empty((len(sequences.windows), context + 1), dtype=np.int64)
        self._left = deque(_shard_reads(sources, sequences))

    @property
    def shards(self) -> tuple[OpenShard, ...]:
        """The shards still to be read."""
        return tuple(part.source.shards[part.shard] for part in self._left)

    def proceed(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Read until done, or until `stop` returns True between two shards; return True when done."""
        while self._left:
            part = self._left[0]
            part.source.read(part.shard, part.windows, part.rows, self.windows)
            self._left.popleft()
            if self._left and stop():
                return False
        return True


class _ShardRead(NamedTuple):
    source: TokenSource
    shard: int
    windows: NDArray[np.int64]
    rows: NDArray[np.intp]


def _shard_reads(sources: Sequence[TokenSource], sequences: Sequences) -> Iterator[_ShardRead]:
    for index, source in enumerate(sources):
        rows = np.flatnonzero(sequences.sources == index)
        windows = sequences.windows[rows]
        shards = source.shards_of(windows)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            yield _ShardRead(source, shard, windows[here], rows[here])


def read_windows(source: TokenSource, windows: NDArray[np.int64], context: int) -> NDArray[np.int64]:
    """Read windows of one source, (len(windows), context + 1)."""
    reading = Reading((source,), Sequences(np.zeros(len(windows), dtype=np.intp), windows), context)
    reading.proceed()
    return reading.windows


@dataclass(frozen=True)
class Corpus:
    """All data of a run, checked for consistency."""

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
        self._order = DataOrder(mix, training.batch.sequences, training.seed)
        self._sources = corpus.sources
        self._micro_batch = training.batch.micro_batch
        self._context = context
        self.filler = torch.zeros(self._micro_batch, context + 1, dtype=torch.int64)
        """A dummy micro-batch for passes of weight zero."""

    def of_step(self, step: int, skipped: Sequence[StepRange], share: range) -> list[Tensor]:
        """Read the micro-batches `share` of a step, each (micro_batch, context + 1) of int64."""
        reading = self.reading(step, skipped, share)
        reading.proceed()
        return self.cut(reading)

    def reading(self, step: int, skipped: Sequence[StepRange], share: range) -> Reading:
        """Return the read of the micro-batches `share` of a step; nothing is read yet."""
        part = range(share.start * self._micro_batch, share.stop * self._micro_batch)
        return Reading(self._sources, self._order.of_step(step, skipped, part), self._context)

    def cut(self, reading: Reading) -> list[Tensor]:
        """Cut a finished read into micro-batches."""
        return list(torch.from_numpy(reading.windows).split(self._micro_batch)) if len(reading.windows) else []


def folder(uri: str, field: str) -> SourceLocation:
    """Locate a folder of this machine or of a volume. Raises InvalidInput for other URIs."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("", "file"):
        raise InvalidInput(
            f"{field}: data is read from folders and from s3:// only, not from {parsed.scheme}://: copy it to one of "
            "these and name the copy"
        )
    return _Folder(Path(unquote(parsed.path) if parsed.scheme else uri), field)


def open_corpus(training: Training, shape: ResolvedModel, locate: Locate = folder) -> Corpus:
    """Open all sources. Raises InvalidInput for missing or inconsistent data, and the errors of the locations."""
    context = shape.context
    sources = tuple(
        open_source(source, context, f"training.data.sources[{source.name}]", locate)
        for source in training.data.sources
    )
    evaluation = training.evaluation.sources if training.evaluation else ()
    held_out = tuple(
        open_source(source, context, f"training.evaluation.sources[{source.name}]", locate) for source in evaluation
    )
    where, name = split_uri(training.data.tokenizer)
    corpus = Corpus(sources, held_out, locate(where, "training.data.tokenizer").read(name))
    for source in (*sources, *held_out):
        _check_tokens(source, corpus, shape)
    return corpus


def open_source(source: Source, context: int, field: str, locate: Locate = folder) -> TokenSource:
    """Open one source; errors name it by `field`."""
    location = locate(source.uri, f"{field}.uri")
    try:
        dataset = Dataset.from_json(location.read(DATASET_FILE))
    except ValidationError as error:
        raise location.undescribed(error.errors()[0]["msg"]) from error
    dtype = np.dtype(dataset.dtype).newbyteorder("<")
    shards = [location.shard(shard, dtype) for shard in dataset.shards if shard.tokens]
    opened = TokenSource(source.name, dataset, shards, context)
    if opened.windows == 0:
        raise InvalidInput(
            f"{field}: no shard in {source.uri} has the {context + 1} tokens that training.model.context {context} "
            "needs: lower the context or give more data"
        )
    return opened


def _check_tokens(source: TokenSource, corpus: Corpus, shape: ResolvedModel) -> None:
    vocabulary = source.dataset.vocabulary
    if source.dataset.tokenizer_digest != corpus.tokenizer_digest:
        raise InvalidInput(
            f"source {source.name} was made with another tokeniser than training.data.tokenizer: "
            "name the tokeniser that made it, or tokenise the data again"
        )
    if shape.vocabulary is not None and shape.vocabulary < vocabulary:
        raise InvalidInput(
            f"training.model.vocabulary ({shape.vocabulary}) is smaller than the tokeniser's ({vocabulary}): "
            "raise it or leave it out"
        )
    if vocabulary != corpus.vocabulary:
        raise InvalidInput(
            f"source {source.name} says that the vocabulary has {vocabulary} tokens, source "
            f"{corpus.sources[0].name} says {corpus.vocabulary}: tokenise the data again"
        )


class _Folder:
    """A location in the file system. Its shards are mapped at once and stay mapped."""

    def __init__(self, path: Path, field: str) -> None:
        self._path = path
        self._field = field

    def read(self, name: str) -> bytes:
        """See SourceLocation."""
        path = self._path / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{self._field}: {path} cannot be read ({error.strerror}): correct the path") from error

    def shard(self, shard: Shard, dtype: np.dtype[np.unsignedinteger]) -> OpenShard:
        """See SourceLocation. The size is checked."""
        path, wanted = self._path / shard.name, shard.tokens * dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InvalidInput(f"{self._field}: shard {path} cannot be read ({error.strerror}): restore it") from error
        if size != wanted:
            raise InvalidInput(
                f"{self._field}: shard {path} has {size} bytes where {DATASET_FILE} says {wanted}: "
                "it is truncated or was replaced; copy or tokenise it again"
            )
        mapped = np.memmap(path, dtype=dtype, mode="r")
        return lambda: mapped

    def undescribed(self, why: str) -> Exception:
        """See SourceLocation."""
        where = self._path / DATASET_FILE
        return InvalidInput(f"{self._field}: {where} is no dataset description ({why}): tokenise the data again")
