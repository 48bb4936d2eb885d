"""Sources and tokenisers in S3: descriptions are read at once, shards when they are needed, through the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pretrain_api.dataset import DATASET_FILE, Shard
from pretrain_api.messages.trainer_config import Cache, TrainerConfig
from pretrain_api.spec.job import Storage
from pretrain_store.errors import ObjectNotFound, StoreError
from pretrain_store.open import S3Service, is_remote
from pretrain_store.port import FEW_RETRIES, FULL_RETRIES
from pretrain_trainer.core.errors import DataCorrupt, DataMissing
from pretrain_trainer.core.waits import of_field
from pretrain_trainer.datasets.corpus import SourceLocation, Tokens, folder
from pretrain_trainer.datasets.shard_cache import RemoteShard, ShardCache


class Sources:
    """Where the sources of a run lie: in folders, or in S3 behind one cache."""

    def __init__(self, storage: Storage, environ: Mapping[str, str], cache: ShardCache) -> None:
        self._looking = S3Service(storage, environ, FEW_RETRIES)
        self._enduring = S3Service(storage, environ, FULL_RETRIES)
        self._cache = cache

    @classmethod
    def of(cls, config: TrainerConfig, environ: Mapping[str, str]) -> Sources:
        """The sources of a job. Nothing is opened or made yet."""
        cache = ShardCache(cache_folder(config.cache, environ), config.cache.bytes)
        return cls(config.checkpoint.storage, environ, cache)

    def locate(self, uri: str, field: str) -> SourceLocation:
        """See data.Locate."""
        if not is_remote(uri):
            return folder(uri, field)
        return _Remote(self._looking, self._enduring, self._cache, uri.rstrip("/"), field)


def cache_folder(cache: Cache, environ: Mapping[str, str]) -> Path:
    """The folder of the cache: as configured, else the user's own."""
    if cache.path is not None:
        return Path(cache.path)
    return Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "/tmp") / ".cache") / "pretrain"


@dataclass(frozen=True)
class CachedShard:
    """A shard in S3, an OpenShard that is fetched when it is called, or before."""

    cache: ShardCache
    shard: RemoteShard

    def __call__(self) -> Tokens:
        """Map it."""
        return self.cache.tokens(self.shard)

    def fetch_ahead(self, keep: frozenset[str]) -> bool:
        """See ShardCache."""
        return self.cache.fetch_ahead(self.shard, keep)


class _Remote:
    """A SourceLocation in S3."""

    def __init__(self, looking: S3Service, enduring: S3Service, cache: ShardCache, uri: str, field: str) -> None:
        self._looking = looking
        self._enduring = enduring
        self._cache = cache
        self._uri = uri
        self._field = field

    def read(self, name: str) -> bytes:
        """See SourceLocation. It does not try for long: whoever waits asks again."""
        try:
            return self._looking.folder(self._uri).get(name)
        except ObjectNotFound as error:
            raise DataMissing(
                f"{self._field}: there is no {self._uri}/{name}: upload it; training goes on by itself when it is there"
            ) from error
        except StoreError as error:
            raise of_field(error, self._field) from error

    def shard(self, shard: Shard, dtype: np.dtype[np.unsignedinteger]) -> CachedShard:
        """See SourceLocation. Nothing is fetched yet."""
        size = shard.tokens * dtype.itemsize
        fetched = RemoteShard(
            partial(self._enduring.folder, self._uri), self._uri, shard.name, size, shard.sha256, dtype, self._field
        )
        return CachedShard(self._cache, fetched)

    def undescribed(self, why: str) -> Exception:
        """See SourceLocation."""
        return DataCorrupt(
            f"{self._field}: {self._uri}/{DATASET_FILE} is no dataset description ({why}): upload the data anew; "
            "training goes on by itself"
        )
