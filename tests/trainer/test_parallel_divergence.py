"""A loss that diverges under tensor and pipeline parallelism: what one process would do, all ranks of a replica do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain_api.checkpoint.lineage import StepRange, manifest_key
from pretrain_api.messages.reports import Diverged, Finished, RolledBack
from pretrain_api.spec.job import Divergence
from support.trainer.parallel import GPT2, Case, Laid, run_all_ranks
from support.trainer.world import PatientCheckpointer, RankEnd, a_corpus

STEPS, EVERY = 8, 2
"""Of a run, and between its checkpoints."""
LAID = (
    Laid(),
    Laid(tensor=2, world_size=2),
    Laid(pipeline=2, world_size=2),
    Laid(tensor=2, pipeline=2, world_size=4),
    Laid("full", pipeline=2, world_size=4),
)
FAULTS: dict[str, tuple[int, dict[str, Any]]] = {
    "to a checkpoint": (6, {"skip_steps": 2}),
    "to the beginning": (2, {"skip_steps": 1, "learning_rate_factor": 0.5}),
    "skip": (5, {"action": "Skip"}),
    "warn": (5, {"action": "Warn"}),
}
"""The step of data that is no number, and what the job says to that."""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Laid], list[RankEnd]]:
    """Ends of all ranks, by fault and by parallelism."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = a_corpus(folder)
    names = [(name, laid) for laid in LAID for name in FAULTS]
    cases = [_case(laid, corpus, folder / str(number), name) for number, (name, laid) in enumerate(names)]
    return dict(zip(names, run_all_ranks(cases, checkpointer=PatientCheckpointer), strict=True))


def _case(laid: Laid, corpus: Path, folder: Path, name: str) -> Case:
    step, settings = FAULTS[name]
    case = laid.case(corpus, GPT2, folder, steps=STEPS, evaluation=None, sampling=None)
    changes = {"nan_steps": (step,), "divergence": Divergence(**settings)}
    return Case(case.config.model_copy(update=changes), laid.world_size)


@pytest.mark.parametrize("laid", LAID[1:], ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_all_ranks_answer_as_one_process_does(
    ends: dict[tuple[str, Laid], list[RankEnd]], name: str, laid: Laid
) -> None:
    (alone,), ranks = ends[name, LAID[0]], ends[name, laid]

    assert [end.exit_code for end in ranks] == [0] * laid.world_size
    for end in ranks:
        assert [report.rollback.to_step for report in end.of(RolledBack)] == [
            report.rollback.to_step for report in alone.of(RolledBack)
        ]
    first = ranks[0]
    assert first.step_numbers == alone.step_numbers
    assert first.losses == pytest.approx(alone.losses, rel=1e-5)
    said = [[(report.step, report.cause, report.action) for report in end.of(Diverged)] for end in (first, alone)]
    assert said[0] == said[1]
    assert first.of(Finished) == alone.of(Finished)


def test_one_process_does_what_the_job_says(ends: dict[tuple[str, Laid], list[RankEnd]]) -> None:
    back, anew, skip, warn = (ends[name, LAID[0]][0] for name in FAULTS)

    assert back.step_numbers == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert back.of(RolledBack)[0].skipped == (StepRange(first=6, last=7),)
    assert back.of(Finished)[0].checkpoint == manifest_key(2, STEPS)
    assert anew.step_numbers == [1, *range(1, STEPS + 1)]
    assert anew.of(RolledBack)[0].rollback.to_step == 0
    assert skip.step_numbers == warn.step_numbers == [1, 2, 3, 4, 6, 7, 8]
