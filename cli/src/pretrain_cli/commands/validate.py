"""`pretrain validate`: list every mistake of a job file with its fix, or summarise the job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain_api.problems import InvalidJob, Problem
from pretrain_api.spec.job import PretrainJob
from pretrain_api.spec.model import ResolvedModel, parameters, resolve
from pretrain_api.spec.support import unsupported
from pretrain_cli.errors import CliExit
from pretrain_cli.inputs.job_file import load_job
from pretrain_data.verification import read_tokenizer


def validate(path: Path, sets: Sequence[str]) -> int:
    """Check a job file without its data, print the result and return the exit code."""
    try:
        job = load_job(path, sets)
        findings = unsupported(job.spec)
        if refused := [Problem(f.path, f.message) for f in findings if f.severity == "error"]:
            raise InvalidJob(str(path), refused)
    except InvalidJob as invalid:
        print("\n".join(invalid.lines()))
        return CliExit.BAD_INPUT
    for finding in findings:
        print(f"{path}: warning: {finding.path}: {finding.message}")
    print(f"{path} is valid")
    print("\n".join(summary(job, path.parent)))
    return CliExit.DONE


def summary(job: PretrainJob, base_dir: Path) -> tuple[str, str]:
    """Summarise the model's size and the length of the training in two lines."""
    training = job.spec.training
    model, steps = resolve(training.model), training.total_steps
    rows = model.vocabulary or _embedding_rows(model, base_dir / training.data.tokenizer)
    size = f"{_short(parameters(model, rows or 0))} parameters{'' if rows else ' plus the embedding'}"
    shape = f"{model.layers} layers, {model.heads} heads, width {model.width}, context {model.context}"
    tokens = training.tokens_per_step
    return (
        f"model: {size} ({model.family}, {shape})",
        f"training: {steps:,} steps of {tokens:,} tokens, {_short(steps * tokens)} tokens in all",
    )


def _embedding_rows(model: ResolvedModel, tokenizer: Path) -> int | None:
    """Return the embedding rows for the tokeniser; None: it cannot be read."""
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
