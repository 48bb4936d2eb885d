"""torch.compile, block by block: all blocks share one graph, which is compiled once."""

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
    """Compile each block at its first use. Blocks are not wrapped, so names of parameters stay.

    Compiled code is cached in `cache`, or in TORCHINDUCTOR_CACHE_DIR if it is set, for later processes. Raises
    InvalidInput without a C++ compiler.
    """
    if not environ.get("CXX") and not any(shutil.which(name) for name in COMPILERS):
        raise InvalidInput(
            "training.compile needs a C++ compiler, and the worker has none: "
            "add g++ to its image, or set training.compile to false"
        )
    if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):  # torch's default, set when it is imported
        os.environ[CACHE_VARIABLE] = str(cache / "inductor")  # torch reads the process's environment only
    for block in model.blocks:
        if isinstance(block, Block):
            block.compile(backend=backend)
