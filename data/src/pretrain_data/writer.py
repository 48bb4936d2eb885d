"""Writer of tokenised datasets: `NNNNN.bin` shards beside `dataset.json` (see `pretrain_api.dataset`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain_api.dataset import DATASET_FILE, Dataset, Shard

END_OF_TEXT = "<|endoftext|>"
SHARD_TOKENS = 1 << 24
BATCH_DOCUMENTS = 256


def train_tokenizer(texts: Sequence[str], vocabulary: int, path: Path) -> Tokenizer:
    """Train a byte-level BPE tokeniser of `vocabulary` tokens, including END_OF_TEXT, and save it as `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def write_dataset(texts: Sequence[str], tokenizer: Tokenizer, folder: Path, tokenizer_file: Path) -> Dataset:
    """Tokenise `texts`, each followed by END_OF_TEXT, into shards of SHARD_TOKENS; `dataset.json` is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = tokenizer.get_vocab_size()
    dtype = np.dtype("<u2") if vocabulary < 1 << 16 else np.dtype("<u4")
    tokens = np.concatenate([np.zeros(0, dtype), *_encoded(texts, tokenizer, dtype)])
    shards = [
        _write_shard(folder / f"{number:05d}.bin", tokens[start : start + SHARD_TOKENS])
        for number, start in enumerate(range(0, len(tokens), SHARD_TOKENS))
    ]
    dataset = Dataset(
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        vocabulary=vocabulary,
        documents=len(texts),
        tokenizer_digest=hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        shards=tuple(shards),
    )
    (folder / DATASET_FILE).write_text(dataset.model_dump_json(indent=1))
    return dataset


def _encoded(texts: Sequence[str], tokenizer: Tokenizer, dtype: np.dtype) -> Iterator[np.ndarray]:
    end = tokenizer.token_to_id(END_OF_TEXT)
    remaining = iter(texts)
    while batch := list(islice(remaining, BATCH_DOCUMENTS)):
        for encoding in tokenizer.encode_batch(batch):
            yield np.array([*encoding.ids, end], dtype)


def _write_shard(path: Path, tokens: np.ndarray) -> Shard:
    content = tokens.tobytes()
    path.write_bytes(content)
    return Shard(name=path.name, tokens=len(tokens), sha256=hashlib.sha256(content).hexdigest())
