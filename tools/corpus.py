"""Corpus of the quickstart: text that comes with every Python, tokenised into weighted sources.

Code: modules of the standard library. Prose: the language reference shown by `help()` and the standard library's longer
docstrings. Every twentieth document is held out for validation.

    python -m tools.corpus OUT_DIR
"""

from __future__ import annotations

import ast
import json
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

from pretrain_data.writer import train_tokenizer, write_dataset

VOCABULARY = 1024
CODE_BYTES = 5_000_000
TOKENIZER_BYTES = 2_000_000
SHORTEST_DOCSTRING = 200
HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class Texts:
    """Documents of a source, split into training and held-out."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def main(out: Path) -> None:
    """Build the corpus under `out`, unless this Python built it already."""
    console = Console(stderr=True)
    stamp = out / "built-from.json"
    origin = json.dumps({"python": platform.python_version(), "vocabulary": VOCABULARY, "bytes": CODE_BYTES})
    if stamp.exists() and stamp.read_text() == origin:
        console.print(f"corpus: {out} is up to date")
        return
    sources = {"code": _split(list(_code())), "prose": _split(list(_prose()))}
    sample = _sample([text for source in sources.values() for text in source.training])
    with console.status(f"training a byte-level BPE tokeniser of {VOCABULARY} tokens"):
        tokenizer = train_tokenizer(sample, VOCABULARY, out / "tokenizer.json")
    for name, source in track(list(sources.items()), description="tokenising", console=console, transient=True):
        _write(tokenizer, out, name, source, console)
    stamp.write_text(origin)


def _write(tokenizer: Tokenizer, out: Path, name: str, source: Texts, console: Console) -> None:
    for folder, texts in ((name, source.training), (f"held-out-{name}", source.held_out)):
        dataset = write_dataset(texts, tokenizer, out / folder, out / "tokenizer.json")
        console.print(f"corpus: {folder}: {dataset.documents:,} documents, {dataset.tokens:,} tokens")


def _code() -> Iterator[str]:
    """Iterate over modules of the standard library, without its tests, up to CODE_BYTES."""
    total = 0
    for _, text in _modules():
        if total > CODE_BYTES:
            return
        total += len(text)
        yield text


def _prose() -> Iterator[str]:
    """Iterate over the language reference of `help()`, then the longer docstrings of the standard library."""
    from pydoc_data.topics import topics  # one megabyte, used only here

    yield from (topics[name] for name in sorted(topics))
    seen: set[str] = set()
    for _, text in _modules():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) >= SHORTEST_DOCSTRING and doc not in seen:
                    seen.add(doc)
                    yield doc


def _modules() -> Iterator[tuple[Path, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "idle_test", "lib2to3", "pydoc_data", "encodings"}
    for path in sorted(library.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(library).parts):
            try:
                text = path.read_text(encoding="utf-8")
                ast.parse(text)
            except (UnicodeDecodeError, SyntaxError):
                continue
            if text.strip():
                yield path, text


def _split(documents: Sequence[str]) -> Texts:
    return Texts(
        training=tuple(text for i, text in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1),
        held_out=tuple(documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]),
    )


def _sample(documents: Sequence[str]) -> list[str]:
    """Select documents spread over the whole corpus, TOKENIZER_BYTES in total."""
    stride = max(1, sum(map(len, documents)) // TOKENIZER_BYTES)
    return list(documents[::stride])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
