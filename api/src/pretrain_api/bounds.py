"""Domains of numbers and texts in messages. `Wire` bounds the fields that have no domain of their own.

A value outside its domain is refused. Free text is cut instead, since its length depends on foreign programs.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from pretrain_api.spec.job import MAX_WORKERS
from pretrain_api.spec.quantities import MAX_STEPS

MAX_NUMBER = 10**9
MAX_PROCESSES = 1024
"""Training processes of one worker."""
MAX_TEXT = 16_384
MAX_SAMPLE = 2**20

Rank = Annotated[int, Field(ge=0, lt=MAX_WORKERS * MAX_PROCESSES)]
LocalRank = Annotated[int, Field(ge=0, lt=MAX_PROCESSES)]
Slot = Annotated[int, Field(ge=0, lt=2 * MAX_WORKERS)]
"""Slots of spares follow those of the workers."""
Attempt = Annotated[int, Field(ge=0, le=10**9)]
Processes = Annotated[int, Field(ge=1, le=MAX_PROCESSES)]
Pid = Annotated[int, Field(ge=0, le=2**22)]
"""Linux allows at most 2^22 process ids."""
Port = Annotated[int, Field(ge=0, le=65_535)]
ExitStatus = Annotated[int, Field(ge=-255, le=255)]
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
"""Number of a generation; 0: none."""
Epoch = Annotated[int, Field(ge=0, le=10**12)]
Step = Annotated[int, Field(ge=0, le=2 * MAX_STEPS)]
"""Skipped ranges may end after the last step of a job."""
Count = Annotated[int, Field(ge=0)]
MAX_SECONDS = 10 * 366 * 86_400
Seconds = Annotated[
    float,
    Field(ge=-MAX_SECONDS, le=MAX_SECONDS, allow_inf_nan=False),
    AfterValidator(lambda seconds: max(0.0, seconds)),
]
"""Duration. The difference of two clocks may be below 0, and is then 0."""
UnixTime = Annotated[float, Field(ge=0, le=4_102_444_800, allow_inf_nan=False)]
"""Until 2100."""
Measured = Annotated[float, Field(allow_inf_nan=True)]
"""Result of the model's arithmetic, which may be NaN or infinite."""
Name = Annotated[str, Field(max_length=256)]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _cut_sample(text: str) -> str:
    return text if len(text) <= MAX_SAMPLE else text[: MAX_SAMPLE - 1] + "…"


Text = Annotated[str, Field(max_length=2**22), AfterValidator(_cut)]
"""Message for people."""
SampleText = Annotated[str, Field(max_length=2**24), AfterValidator(_cut_sample)]
"""Text written by the model, or the prompt for it."""
