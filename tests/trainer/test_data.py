"""Sources on disk, and the errors that are raised before training starts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain_api.dataset import DATASET_FILE, Dataset
from pretrain_api.spec.data import Source
from pretrain_api.spec.model import resolve
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.datasets.corpus import Batches, Corpus, open_corpus, open_source, read_windows
from pretrain_trainer.datasets.unigram import unigram_loss
from support.trainer.world import VOCABULARY, a_config, a_corpus, a_source, a_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return a_corpus(tmp_path)


def opened(folder: Path, **training: Any) -> Corpus:
    config = a_config(folder, training)
    return open_corpus(config.training, resolve(config.training.model))


def test_windows_cover_each_shard_with_stride_context_and_never_cross(tmp_path: Path) -> None:
    digest = a_tokenizer(tmp_path)
    shards = [np.arange(0, 10), np.arange(10, 18), np.arange(40, 43), np.arange(20, 29)]
    uri = a_source(tmp_path, "web", shards, digest)
    source = open_source(Source(name="web", uri=str(uri)), 4, "field")

    assert read_windows(source, np.arange(source.windows), 4).tolist() == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [10, 11, 12, 13, 14],
        [20, 21, 22, 23, 24],
        [24, 25, 26, 27, 28],
    ]


def test_micro_batches_of_a_step_come_whole(corpus: Path) -> None:
    training = a_config(corpus).training
    batches = Batches(opened(corpus), training, 16)

    whole = batches.of_step(2, (), range(5))
    part = batches.of_step(2, (), range(3, 5))

    assert [tuple(batch.shape) for batch in whole] == [(4, 17)] * 5
    assert [batch.tolist() for batch in part] == [batch.tolist() for batch in whole[3:]]
    assert batches.of_step(2, (), range(5, 5)) == []


def test_the_unigram_loss_is_the_entropy_of_the_weighted_mix(tmp_path: Path) -> None:
    digest = a_tokenizer(tmp_path)
    sources = [
        open_source(Source(name=name, uri=str(a_source(tmp_path, name, [tokens], digest))), 4, "field")
        for name, tokens in (("a", np.zeros(100)), ("b", np.tile([1, 2], 300)))
    ]

    expected = -(0.25 * np.log(0.25) + 2 * 0.375 * np.log(0.375))

    assert unigram_loss(sources, [1.0, 3.0], VOCABULARY) == pytest.approx(expected)


def test_a_truncated_shard_is_refused(corpus: Path) -> None:
    shard = corpus / "prose" / "00001.bin"
    shard.write_bytes(shard.read_bytes()[:-100])

    with pytest.raises(InvalidInput, match=r"training.data.sources\[prose\].uri: shard .*00001.bin has 5900 bytes"):
        opened(corpus)


def test_a_missing_shard_is_refused(corpus: Path) -> None:
    (corpus / "prose" / "00001.bin").unlink()

    with pytest.raises(InvalidInput, match=r"shard .*00001.bin cannot be read"):
        opened(corpus)


def test_a_missing_source_is_refused(corpus: Path) -> None:
    (corpus / "code" / DATASET_FILE).unlink()

    with pytest.raises(InvalidInput, match=r"sources\[code\].uri: .*dataset.json cannot be read"):
        opened(corpus)


def test_a_file_that_is_no_description_is_refused(corpus: Path) -> None:
    (corpus / "code" / DATASET_FILE).write_text("{}")

    with pytest.raises(InvalidInput, match=r"sources\[code\].uri: .*dataset.json is no dataset description"):
        opened(corpus)


def test_a_missing_tokeniser_is_refused(corpus: Path) -> None:
    (corpus / "tokenizer.json").unlink()

    with pytest.raises(InvalidInput, match=r"training.data.tokenizer: .*tokenizer.json cannot be read"):
        opened(corpus)


def test_another_tokeniser_is_refused(corpus: Path) -> None:
    (corpus / "tokenizer.json").write_text("{ }")

    with pytest.raises(InvalidInput, match="source prose was made with another tokeniser"):
        opened(corpus)


def test_a_context_longer_than_the_shards_is_refused(corpus: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no shard in .* has the 3001 tokens that training.model.context 3000"):
        opened(corpus, model={"layers": 1, "heads": 1, "width": 8, "context": 3000})


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    uri = a_source(tmp_path, "none", [], a_tokenizer(tmp_path))

    with pytest.raises(InvalidInput, match="no shard in"):
        open_source(Source(name="none", uri=str(uri)), 4, "field")


def test_a_vocabulary_smaller_than_the_tokenisers_is_refused(corpus: Path) -> None:
    with pytest.raises(InvalidInput, match=r"training.model.vocabulary \(60\) is smaller than the tokeniser's \(61\)"):
        opened(corpus, model={"layers": 1, "heads": 1, "width": 8, "context": 16, "vocabulary": 60})


def test_data_elsewhere_is_refused() -> None:
    with pytest.raises(InvalidInput, match="not from https://"):
        open_source(Source(name="web", uri="https://corpus/web"), 4, "field")


def test_windows_come_in_the_order_asked_for_whatever_shards_they_are_in(tmp_path: Path) -> None:
    shards = [np.arange(0, 10), np.arange(10, 20)]
    source = open_source(Source(name="web", uri=str(a_source(tmp_path, "web", shards, a_tokenizer(tmp_path)))), 4, "f")

    assert read_windows(source, np.array([3, 0, 2, 1, 3]), 4)[:, 0].tolist() == [14, 0, 10, 4, 14]


def test_wide_tokens_are_read(tmp_path: Path) -> None:
    folder = a_source(tmp_path, "wide", [np.arange(9)], a_tokenizer(tmp_path))
    (folder / "00000.bin").write_bytes((np.arange(9) + 70_000).astype("<u4").tobytes())
    described = Dataset.from_json((folder / DATASET_FILE).read_bytes())
    (folder / DATASET_FILE).write_text(described.model_copy(update={"dtype": "uint32"}).to_json())
    source = open_source(Source(name="wide", uri=folder.as_uri()), 4, "field")

    assert read_windows(source, np.array([1]), 4).tolist() == [[70_004, 70_005, 70_006, 70_007, 70_008]]
