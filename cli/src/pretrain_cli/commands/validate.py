"""`pretrain validate`: every mistake of a job file with its path and what is allowed, or what the job would train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain_api.problems import InvalidJob, Problem
from pretrain_api.spec.job import PretrainJob
from pretrain_api.spec.model import ResolvedModel, parameters, resolve
from pretrain_api.spec.support import unsupported
from pretrain_cli.inputs.job_file import load_job
from pretrain_data.verification import read_tokenizer

VALID, BAD_INPUT = 0, 2


def validate(path: Path, sets: Sequence[str]) -> int:
    """Check a job file without looking at its data; print the verdict and return the exit code."""
    try:
        job = load_job(path, sets)
        findings = unsupported(job.spec)
        if refused := [Problem(f.path, f.message) for f in findings if f.severity == "error"]:
            raise InvalidJob(str(path), refused)
    except InvalidJob as invalid:
        print("\n".join(invalid.lines()))
        return BAD_INPUT
    for finding in findings:
        print(f"{path}: warning: {finding.path}: {finding.message}")
    print(f"{path} is valid")
    print("\n".join(summary(job, path.parent)))
    return VALID


def summary(job: PretrainJob, base_dir: Path) -> tuple[str, str]:
    """Two lines: the model's size, and how long it is trained."""
    training = job.spec.training
    model, steps = resolve(training.model), training.total_steps
    rows = model.vocabulary or _embedding_rows(model, base_dir / training.data.tokenizer)
    size = f"{_short(parameters(model, rows or 0))} parameters{'' if rows else ' and an embedding for the tokeniser'}"
    shape = f"{model.layers} layers, {model.heads} heads, width {model.width}, context {model.context}"
    tokens = training.tokens_per_step
    return (
        f"model: {size} ({model.family}, {shape})",
        f"training: {steps:,} steps of {tokens:,} tokens, {_short(steps * tokens)} tokens in all",
    )


def _embedding_rows(model: ResolvedModel, tokenizer: Path) -> int | None:
    """Rows for the tokeniser, where it is at hand."""
    try:
        return model.embedding_rows(read_tokenizer(tokenizer).vocabulary)
    except (OSError, ValueError):
        return None


def _short(number: float) -> str:
    for suffix in ("", " K", " M", " B"):
        if number < 1000:
            return f"{number:.4g}{suffix}"
        number /= 1000
    return f"{number:,.4g} T"
