"""Whole local runs: a corpus and a job so small that a run takes seconds, and the process around them."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import psutil
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from pretrain_api.status.job import JobStatus
from pretrain_api.status.records import StepRecord
from pretrain_api.status.report import RunReport
from pretrain_cli.render.report import final_history, read_metrics
from pretrain_data.writer import train_tokenizer, write_dataset

PRETRAIN = Path(sys.executable).with_name("pretrain")
STEPS = 150
TOLERANCE = 1e-5

# The learning rate is low, so that rounding differences between world sizes do not grow: at 5e-3 they grow from 1e-7 to
# 1e-3 within 200 steps.
JOB = """\
apiVersion: pretrain.dev/v1alpha1
kind: PretrainJob
metadata: {name: tiny}
spec:
  workers: {replicas: 3, elastic: {min: 1, max: 5}}
  training:
    model: {family: gpt2, layers: 2, heads: 2, width: 32, context: 32}
    data:
      tokenizer: tokenizer.json
      sources:
        - {name: words, uri: words, weight: 2}
        - {name: numbers, uri: numbers, weight: 1}
    steps: STEPS
    batch: {sequences: 60, microBatch: 4}
    optimizer: {learningRate: 1e-4}
    schedule: {kind: constant, warmupSteps: 5}
    precision: fp32
    evaluation: {every: 1000, sequences: 4, sources: [{name: words, uri: words}]}
    sampling: {prompt: "the ", tokens: 8}
  checkpoint:
    storage: {path: checkpoints}
    interval: {steps: 20}
"""


def write_job(folder: Path) -> Path:
    """A job file with its corpus beside it."""
    chance = random.Random(1)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
    texts = [" ".join(chance.choices(words, k=40)) for _ in range(3000)]
    numbers = [" ".join(str(start + index) for index in range(30)) for start in chance.choices(range(900), k=2000)]
    tokenizer = train_tokenizer(texts + numbers, 300, folder / "tokenizer.json")
    write_dataset(texts, tokenizer, folder / "words", folder / "tokenizer.json")
    write_dataset(numbers, tokenizer, folder / "numbers", folder / "tokenizer.json")
    job = folder / "job.yaml"
    job.write_text(JOB.replace("STEPS", str(STEPS)))
    return job


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    out: Path
    code: int
    stdout: str
    stderr: str

    @property
    def report(self) -> RunReport:
        return RunReport.from_json((self.out / "report.json").read_bytes())

    @property
    def status(self) -> JobStatus:
        return JobStatus.from_json((self.out / "status.json").read_bytes())

    @property
    def metrics(self) -> tuple[StepRecord, ...]:
        return read_metrics(self.out / "metrics.jsonl")

    @property
    def losses(self) -> list[float]:
        """The loss of every step from the first on, of the history that counts."""
        history = final_history(self.metrics)
        assert [record.step for record in history] == list(range(1, len(history) + 1))
        return [record.loss for record in history]

    def parameters(self) -> str:
        """A digest of the model in the newest checkpoint, in whatever shards it lies."""
        newest = max((self.out / "checkpoints").rglob("manifest.json"), key=lambda path: path.parent.name)
        reader = FileSystemReader(newest.parent)
        saved = reader.read_metadata().state_dict_metadata
        names = sorted(name for name in saved if name.startswith("model."))
        model = {name: torch.empty(cast("TensorStorageMetadata", saved[name]).size) for name in names}
        load(model, storage_reader=reader, no_dist=True)
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.values())).hexdigest()

    def explain(self) -> str:
        """All that was said, for a failing test."""
        logs = [f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted((self.out / "logs").glob("*.log"))]
        return "\n".join([f"exit code {self.code}", self.stdout, self.stderr, *logs])


class Run:
    """A `pretrain run` under way. A context manager: nothing of it is left afterwards."""

    def __init__(self, job: Path, out: Path, *arguments: str) -> None:
        self.out = out
        self._command = [str(PRETRAIN), "run", str(job), "--out", str(out), *arguments]

    def __enter__(self) -> Run:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
        )
        self.said: list[str] = []
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    @property
    def stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def until_line(self, wanted: Callable[[str], bool]) -> str:
        """Read what it says up to a line that is wanted."""
        for line in self.stdout:
            self.said.append(line)
            if wanted(line):
                return line
        raise AssertionError("".join([*self.said, *(self.process.stderr or ())]))

    def below(self) -> list[psutil.Process]:
        """All processes of the run but the first."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def finish(self) -> Finished:
        stdout, stderr = self.process.communicate(timeout=240)
        return Finished(self.out, self.process.returncode, "".join(self.said) + stdout, stderr)


def run(job: Path, out: Path, *arguments: str) -> Finished:
    """Run a job to its end."""
    with Run(job, out, *arguments) as started:
        return started.finish()


class Baseline:
    """The same job undisturbed, as far as it is asked for: going on where it stopped changes nothing."""

    def __init__(self, job: Path, out: Path) -> None:
        self._job = job
        self._out = out
        self._losses: list[float] = []

    def losses(self, steps: int) -> list[float]:
        """The losses of the first steps."""
        if len(self._losses) < steps:
            finished = run(self._job, self._out, "--set", f"training.steps={steps}")
            assert finished.code == 0, finished.explain()
            assert finished.report.incidents == ()
            self._losses = finished.losses
        return self._losses[:steps]

    def difference(self, losses: Sequence[float]) -> float:
        """The largest relative difference of any step's loss to the undisturbed one's."""
        return max(
            abs(loss - wanted) / abs(wanted) for loss, wanted in zip(losses, self.losses(len(losses)), strict=True)
        )
