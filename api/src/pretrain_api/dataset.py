"""Tokenised dataset on disk: shards `NNNNN.bin` of little-endian tokens without a header, beside `dataset.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain_api.base import Frozen

DATASET_FILE = "dataset.json"


class Shard(Frozen):
    """File of tokens."""

    name: str = Field(pattern=r"^\d{5}\.bin$")
    tokens: int = Field(ge=0)
    sha256: str


class Dataset(Frozen):
    """Contents of `dataset.json`."""

    version: int = 1
    dtype: Literal["uint16", "uint32"]
    vocabulary: int = Field(ge=2, description="Size of the tokeniser's vocabulary: every token is below it")
    documents: int = Field(ge=0)
    tokenizer_digest: str = Field(description="sha256 of tokenizer.json's bytes")
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)
