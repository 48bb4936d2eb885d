"""Model folder that `AutoModelForCausalLM` and `AutoTokenizer` load: weights, configuration, tokeniser."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from pretrain_api.checkpoint.lineage import StoredObject
from pretrain_api.messages.export import ExportDtype
from pretrain_api.spec.model import ResolvedModel
from pretrain_store.digest import digest_of
from pretrain_trainer.evaluation.sampling import START_TOKENS
from pretrain_trainer.hf.mapping import config, export_state

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_BYTES = 5_000_000_000
"""Largest size of a weight file, as in Hugging Face's own; a larger tensor has a file of its own."""
MOST_SUPPRESSED = 64
_ENDS = ("<|endoftext|>", "</s>")


@dataclass(frozen=True)
class ModelFolder:
    """Content of the folder."""

    shape: ResolvedModel
    state: Mapping[str, Tensor]
    """Tensors under our names."""
    tokenizer: bytes
    dtype: ExportDtype
    temperature: float | None
    """Temperature of sampling; None: the library's default."""

    def write(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        """Write all files into `folder`, which exists and is empty."""
        rows = self.state["token_embedding.weight"].shape[0]
        tokenizer = Tokenizer.from_str(self.tokenizer.decode())
        marks = _marks(tokenizer)
        ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in marks.items()}
        ids = {"bos_token_id": None, "eos_token_id": None, **ids}
        described = config(self.shape, rows) | ids | {"dtype": self.dtype, "torch_dtype": self.dtype}
        _write_json(folder / "config.json", described)
        _write_json(folder / "generation_config.json", ids | self._generation(rows, tokenizer.get_vocab_size()))
        (folder / "tokenizer.json").write_bytes(self.tokenizer)
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(marks, self.shape.context))
        self._write_weights(folder, file_bytes)

    def _generation(self, rows: int, vocabulary: int) -> dict[str, Any]:
        generation: dict[str, Any] = {"do_sample": True}
        if self.temperature is not None:
            generation["temperature"] = self.temperature
        if 0 < rows - vocabulary <= MOST_SUPPRESSED:  # rows that pad the embedding and represent no token
            generation["suppress_tokens"] = list(range(vocabulary, rows))
        return generation

    def _write_weights(self, folder: Path, file_bytes: int) -> None:
        wanted = torch.float32 if self.dtype == "float32" else torch.bfloat16
        tensors = {name: tensor.to(wanted) for name, tensor in export_state(self.state, self.shape).items()}
        parts = list(_parts({name: tensor.nbytes for name, tensor in tensors.items()}, file_bytes))
        places: dict[str, str] = {}
        for number, names in enumerate(parts, 1):
            file = WEIGHTS if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
        if len(parts) > 1:
            size = sum(tensor.nbytes for tensor in tensors.values())
            _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def digests(folder: Path) -> tuple[StoredObject, ...]:
    """Return size and sha256 of each file in a folder."""
    found = ((path.name, digest_of(path)) for path in sorted(folder.iterdir()))
    return tuple(StoredObject(key=name, size=digest.size, sha256=digest.sha256) for name, digest in found)


def _parts(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Divide names, in order, into parts of at most `most` bytes."""
    part: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if part and filled + size > most:
            yield part
            part, filled = [], 0
        part.append(name)
        filled += size
    yield part


def _marks(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the tokeniser's tokens for the begin and end of a text, as far as it has them."""
    known = {"bos_token": START_TOKENS, "eos_token": _ENDS}
    found = {
        name: next((token for token in tokens if tokenizer.token_to_id(token) is not None), None)
        for name, tokens in known.items()
    }
    return {name: token for name, token in found.items() if token is not None}


def _tokenizer_config(marks: Mapping[str, str], context: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **marks,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
