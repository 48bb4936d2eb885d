"""Imported by the process from which ranks are forked when blocks are compiled: the compiler, 2 s of CPU for each."""

import torch._inductor.compile_fx  # noqa: F401
