"""The program as a process: its output and its exit codes."""

import json
from pathlib import Path

import pytest
import torch

from pretrain_api.messages.reports import REPORT_BODY, CheckpointRejected, Failed, NumberTaken, ReportBody
from pretrain_api.messages.trainer_config import ExitCode
from pretrain_trainer.core.errors import (
    CheckpointRejectedError,
    CollectiveFailed,
    InvalidInput,
    NoUsableCheckpointError,
    NumberTakenError,
    SupersededError,
)
from pretrain_trainer.observability.failures import process_exit
from pretrain_trainer.observability.memory_advice import PeakMemory, advice
from support.trainer.world import a_config, a_corpus, run_program, saving_run


def printed(output: str) -> list[ReportBody]:
    return [REPORT_BODY.validate_json(line) for line in output.splitlines()]


def test_it_trains_unattended_and_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    config, file = saving_run(a_corpus(tmp_path), tmp_path / "run", every=2), tmp_path / "config.json"
    file.write_text(config.to_json())

    first = run_program(tmp_path, file)
    longer = config.training.model_copy(update={"steps": 8})
    file.write_text(config.model_copy(update={"training": longer}).to_json())
    second = run_program(tmp_path, file)

    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    assert [report.step for report in printed(first.stdout) if report.kind == "step"] == [1, 2, 3, 4, 5, 6]
    assert [report.step for report in printed(second.stdout) if report.kind == "step"] == [7, 8]
    assert printed(second.stdout)[-1].kind == "finished"


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    config, file = saving_run(a_corpus(tmp_path), tmp_path / "run"), tmp_path / "config.json"
    file.write_text(config.to_json())
    (tmp_path / "code" / "dataset.json").unlink()

    ended = run_program(tmp_path, file)

    assert ended.exit_code == ExitCode.INVALID
    assert ended.stderr.startswith("rank 0: training.data.sources[code].uri: ")
    assert ended.stderr.count("\n") == 1
    assert printed(ended.stdout)[-1].kind == "failed"
    assert not (tmp_path / "run").exists()


def test_a_configuration_with_an_unknown_field_is_bad_input(tmp_path: Path) -> None:
    config, file = saving_run(a_corpus(tmp_path), tmp_path / "run"), tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(config.to_json()) | {"thread": 2}))

    ended = run_program(tmp_path, file)

    assert ended.exit_code == ExitCode.INVALID
    assert "thread: " in ended.stderr


@pytest.mark.parametrize(
    ("error", "code", "reason", "retryable"),
    [
        (InvalidInput("x"), ExitCode.INVALID, "InvalidInput", False),
        (CollectiveFailed("x"), ExitCode.COLLECTIVE, "CollectiveError", True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), 75, "CollectiveError", True),
        (ConnectionError("the agent did not answer"), 75, "CollectiveError", True),
        (SupersededError("x"), ExitCode.SUPERSEDED, "Superseded", False),
        (NoUsableCheckpointError("x"), ExitCode.NO_USABLE_CHECKPOINT, "NoUsableCheckpoint", False),
        (torch.OutOfMemoryError("CUDA out of memory"), ExitCode.OUT_OF_MEMORY, "OutOfMemory", True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 70, "OutOfMemory", True),
        (ZeroDivisionError("division by zero"), ExitCode.FAILED, "ZeroDivisionError", True),
        (RuntimeError("shapes do not fit"), ExitCode.FAILED, "RuntimeError", True),
    ],
)
def test_errors_end_with_their_code_and_reason(error: Exception, code: int, reason: str, retryable: bool) -> None:
    end = process_exit(error, rank=0)

    assert end.exit_code == code
    assert isinstance(end.report, Failed)
    assert (end.report.reason, end.report.exit_code, end.report.retryable) == (reason, code, retryable)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_reports_an_error_that_all_agreed_on(rank: int) -> None:
    rejected, taken = (
        process_exit(CheckpointRejectedError("key", "digest mismatch"), rank),
        process_exit(NumberTakenError(7), rank),
    )

    assert rejected.report == CheckpointRejected(checkpoint="key", message="digest mismatch")
    assert (taken.report, taken.exit_code) == (NumberTaken(highest=7), ExitCode.NUMBER_TAKEN)


def test_other_errors_are_reported_as_failures() -> None:
    assert isinstance(process_exit(CollectiveFailed("x"), 3).report, Failed)
    assert isinstance(process_exit(InvalidInput("x"), 3).report, Failed)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            {"batch": {"sequences": 20, "microBatch": 10}},
            "set training.batch.microBatch to 5 (it is 10; the global batch stays as it is); or set "
            "training.activationCheckpointing to full; or set training.parallelism.shard to full, which divides the "
            "state among the workers; or set training.precision to bf16",
        ),
        (
            {
                "batch": {"sequences": 20, "microBatch": 1},
                "activationCheckpointing": "full",
                "parallelism": {"shard": "full"},
                "precision": "bf16",
            },
            "use devices with more memory, or a smaller model",
        ),
    ],
)
def test_exhausted_memory_is_reported_with_its_peak_and_smaller_settings(
    training: dict[str, object], said: str, tmp_path: Path
) -> None:
    config = a_config(tmp_path, training)

    assert advice(config.training, PeakMemory(78 * GIB, 80 * GIB, "the device")) == (
        f"this rank used 78.00 GiB at its peak, of 80.00 GiB of the device: {said}"
    )
    end = process_exit(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), 0, config.training)
    assert end.exit_code == ExitCode.OUT_OF_MEMORY
    assert end.message.startswith("out of memory: this rank used ")
    assert end.message.endswith(f"{said} (CUDA out of memory. Tried to allocate 2 GiB)")
