"""torch.compile, block by block: all blocks have one graph, so that it is compiled once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.models.decoder import Block, Decoder

COMPILERS = ("g++", "clang++", "c++")
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compile_blocks(model: Decoder, cache: Path, environ: Mapping[str, str], backend: str = "inductor") -> None:
    """Compile each block at its first use. Names of parameters stay: blocks are not wrapped.

    What is compiled is kept in `cache`, unless TORCHINDUCTOR_CACHE_DIR says otherwise, for processes that come later.
    Raises InvalidInput without a C++ compiler.
    """
    if not environ.get("CXX") and not any(shutil.which(name) for name in COMPILERS):
        raise InvalidInput(
            "training.compile needs a C++ compiler, and the worker has none: "
            "add g++ to its image, or set training.compile to false"
        )
    if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):  # that torch sets itself, when it is imported
        os.environ[CACHE_VARIABLE] = str(cache / "inductor")  # torch reads it there and nowhere else
    for block in model.blocks:
        if isinstance(block, Block):
            block.compile(backend=backend)
