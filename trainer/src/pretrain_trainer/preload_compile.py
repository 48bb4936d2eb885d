"""Imports of the compiler (2 s of CPU), for the process that ranks are forked from if blocks are compiled."""

import torch._inductor.compile_fx  # noqa: F401
