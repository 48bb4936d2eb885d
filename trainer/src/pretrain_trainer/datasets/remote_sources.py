"""Sources and tokenisers in S3: descriptions are read at once, shards on demand through the cache."""

from __future__ import annotations

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
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.errors import DataCorrupt, DataMissing
from pretrain_trainer.core.waits import field_error
from pretrain_trainer.datasets.corpus import SourceLocation, Tokens, folder
from pretrain_trainer.datasets.shard_cache import RemoteShard, ShardCache


class Sources:
    """Locations of the sources of a run: folders, or S3 behind one cache."""

    def __init__(self, storage: Storage, environment: Environment, cache: ShardCache) -> None:
        self._looking = S3Service(storage, environment.variables, FEW_RETRIES)
        self._enduring = S3Service(storage, environment.variables, FULL_RETRIES)
        self._cache = cache

    @classmethod
    def of(cls, config: TrainerConfig, environment: Environment) -> Sources:
        """Return the sources of a job; opens and creates nothing yet."""
        cache = ShardCache(cache_folder(config.cache, environment), config.cache.bytes)
        return cls(config.checkpoint.storage, environment, cache)

    def locate(self, uri: str, field: str) -> SourceLocation:
        """See corpus.Locate."""
        if not is_remote(uri):
            return folder(uri, field)
        return _Remote(self._looking, self._enduring, self._cache, uri.rstrip("/"), field)


def cache_folder(cache: Cache, environment: Environment) -> Path:
    """Return the folder of the cache: the configured one, else one in the user's cache."""
    if cache.path is not None:
        return Path(cache.path)
    return environment.user_cache / "pretrain"


@dataclass(frozen=True)
class CachedShard:
    """A shard in S3: an OpenShard that is fetched when it is called, or before."""

    cache: ShardCache
    shard: RemoteShard

    def __call__(self) -> Tokens:
        """Fetch and map the shard."""
        return self.cache.tokens(self.shard)

    def fetch_ahead(self, keep: frozenset[str]) -> bool:
        """See ShardCache."""
        return self.cache.fetch_ahead(self.shard, keep)


class _Remote:
    """A location in S3."""

    def __init__(self, looking: S3Service, enduring: S3Service, cache: ShardCache, uri: str, field: str) -> None:
        self._looking = looking
        self._enduring = enduring
        self._cache = cache
        self._uri = uri
        self._field = field

    def read(self, name: str) -> bytes:
        """See SourceLocation. Fails fast: the caller retries."""
        try:
            return self._looking.folder(self._uri).get(name)
        except ObjectNotFound as error:
            raise DataMissing(
                f"{self._field}: there is no {self._uri}/{name}: upload it; training resumes by itself when it exists"
            ) from error
        except StoreError as error:
            raise field_error(error, self._field) from error

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
            f"{self._field}: {self._uri}/{DATASET_FILE} is no dataset description ({why}): upload the data again; "
            "training resumes by itself"
        )
