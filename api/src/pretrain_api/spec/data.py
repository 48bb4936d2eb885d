"""Data of a training: sources, evaluation on held-out sources, and sampling."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic.config import JsonDict

from pretrain_api.base import Spec
from pretrain_api.spec.quantities import MAX_STEPS

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
MAX_SOURCES = 64
MAX_PROMPT = 10_000
MAX_METRICS = 32
"""Maximum number of metrics that an evaluation hook returns."""
Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
_LIST_BY_NAME: JsonDict = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}


class Source(Spec):
    """Tokenised data source."""

    name: str = Field(pattern=NAME_PATTERN, max_length=63, description="Name in reports; unique in its list")
    uri: str = Field(
        min_length=1,
        max_length=4096,
        description="Folder with dataset.json: s3://…, file://…, or a path relative to the job file",
    )
    weight: float = Field(
        default=1.0, gt=0, le=1e6, description="Share of the sequences, relative to the other weights"
    )


class Data(Spec):
    """Training mix."""

    tokenizer: str = Field(min_length=1, max_length=4096, description="URI of tokenizer.json (Hugging Face tokenizers)")
    sources: tuple[Source, ...] = Field(
        strict=False,
        min_length=1,
        max_length=MAX_SOURCES,
        description="Sources of the weighted mix",
        json_schema_extra=_LIST_BY_NAME,
    )

    mask_documents: bool = Field(
        default=False,
        description="Mask attention across document boundaries; positions still count from the start of the sequence",
    )

    @model_validator(mode="after")
    def _unique(self) -> Self:
        _refuse_duplicates(self.sources)
        return self


class Evaluation(Spec):
    """Evaluation during training, the same at any number of workers."""

    every: int = Field(
        default=500, ge=1, le=MAX_STEPS, description="Steps between evaluations; the last step is always evaluated"
    )
    sequences: int = Field(
        default=64, ge=1, le=10**7, description="Number of sequences to evaluate, from the start of each source"
    )
    sources: tuple[Source, ...] = Field(
        strict=False,
        min_length=1,
        max_length=MAX_SOURCES,
        description="Held-out sources; their weights are ignored",
        json_schema_extra=_LIST_BY_NAME,
    )
    hook: str | None = Field(
        default=None,
        max_length=4096,
        pattern=r"^([A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*|.+[.]py):[A-Za-z_][A-Za-z0-9_]*$",
        description="Custom evaluation function, called at every evaluation: package.module:function, or "
        "file.py:function (relative to the job file in local runs, absolute in pods), importable in the trainer",
    )

    @property
    def hook_file(self) -> str | None:
        """File of the hook; None: the hook is a module, or there is none."""
        where = (self.hook or "").rpartition(":")[0]
        return where if where.endswith(".py") else None

    @model_validator(mode="after")
    def _unique(self) -> Self:
        _refuse_duplicates(self.sources)
        return self


class Sampling(Spec):
    """Texts sampled from the model, at the end and optionally during training."""

    every: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="Steps between samples; absent: at the end only"
    )
    prompt: str = Field(default="", max_length=MAX_PROMPT, description="Prompt of the text")
    prompts: tuple[Prompt, ...] = Field(
        default=(), strict=False, max_length=16, description="Prompts of several texts, instead of `prompt`"
    )
    tokens: int = Field(default=120, ge=1, le=100_000, description="Tokens to generate")
    temperature: float = Field(
        default=0.8,
        gt=0,
        le=100,
        description="Sampling temperature; 1: the model's own distribution, lower: more predictable",
    )

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """Prompts of all texts."""
        return self.prompts or (self.prompt,)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.prompt and self.prompts:
            raise ValueError("give prompt or prompts, not both")
        return self


def _refuse_duplicates(sources: tuple[Source, ...]) -> None:
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"sources: the name {twice[0]!r} is used twice: give each source its own name")
