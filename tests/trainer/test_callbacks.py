"""Callbacks of the training loop: their order, their exceptions, and collectives that were not declared."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from pretrain_api.messages.reports import Evaluated, Finished, ReportBody, Saved, SaveFailed, StepDone
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.core.progress import TrainingProgress
from pretrain_trainer.core.ranks import process_group
from pretrain_trainer.loop.callbacks import Callback, Callbacks, CompletedStep, UndeclaredCollective
from pretrain_trainer.loop.train import train
from support.trainer.world import FakeLink, FileCheckpointer, a_config, a_corpus, run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "training_callback.py"
STEP = CompletedStep(
    TrainingProgress(1, 16),
    StepDone(step=1, loss=1, grad_norm=1, learning_rate=1, tokens=1, tokens_per_second=1, seconds=1),
    finite=True,
    last=False,
)


@pytest.fixture
def alone() -> Iterator[None]:
    with process_group(Environment.of({})):
        yield


class Recording(Callback):
    """Writes its calls to a shared journal."""

    def __init__(self, name: str, journal: list[str]) -> None:
        self.name = name
        self.journal = journal

    def before_step(self, step: int) -> None:
        self.journal.append(f"{self.name}: before {step}")

    def after_step(self, completed: CompletedStep) -> None:
        self.journal.append(f"{self.name}: after {completed.progress.step}{' last' if completed.last else ''}")

    def on_checkpoint(self, outcome: Saved | SaveFailed) -> None:
        self.journal.append(f"{self.name}: saved {outcome.step}")

    def on_evaluation(self, evaluated: Evaluated) -> None:
        self.journal.append(f"{self.name}: evaluated {evaluated.step}")

    def on_end(self, progress: TrainingProgress) -> None:
        self.journal.append(f"{self.name}: end {progress.step}")


class RecordingTogether(Recording):
    """Adds its rank to those of the others."""

    collective: ClassVar[bool] = True

    def after_step(self, completed: CompletedStep) -> None:
        total = torch.tensor([1 + dist.get_rank()])
        dist.all_reduce(total)
        self.journal.append(f"{self.name}: sum {int(total)} after {completed.progress.step}")


class Asking(Callback):
    """Calls a collective that it does not declare."""

    def __init__(self, hook: str, ask: Any) -> None:
        setattr(self, f"_{hook}", ask)

    def before_step(self, step: int) -> None:
        getattr(self, "_before_step", int)()

    def after_step(self, completed: CompletedStep) -> None:
        getattr(self, "_after_step", int)()

    def on_end(self, progress: TrainingProgress) -> None:
        getattr(self, "_on_end", int)()


class Broken(Callback):
    """Fails after a step."""

    def after_step(self, completed: CompletedStep) -> None:
        raise ZeroDivisionError("broken")


# --- the dispatcher ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_callbacks_are_called_in_the_order_of_registration() -> None:
    journal: list[str] = []
    callbacks = Callbacks([Recording("a", journal), RecordingTogether("b", journal)])
    callbacks.add(Recording("c", journal))

    callbacks.before_step(1)
    callbacks.after_step(STEP, collective=False)
    callbacks.after_step(STEP, collective=True)
    callbacks.on_end(STEP.progress)

    assert journal == [
        *(f"{name}: before 1" for name in "abc"),
        "a: after 1",
        "c: after 1",
        "b: sum 1 after 1",
        *(f"{name}: end 1" for name in "abc"),
    ]


COLLECTIVES = {
    "all_reduce": lambda: dist.all_reduce(torch.ones(1)),
    "barrier": lambda: dist.barrier(),
    "broadcast_object_list": lambda: dist.broadcast_object_list([1], src=0),
    "all_gather_object": lambda: dist.all_gather_object([None], 1),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_that_was_not_declared_is_refused_on_any_number_of_ranks(name: str) -> None:
    callbacks = Callbacks([Asking("before_step", COLLECTIVES[name])])

    with pytest.raises(
        UndeclaredCollective, match=r"callback Asking calls c10d\..*set `collective = True` in the class"
    ):
        callbacks.before_step(1)
    COLLECTIVES[name]()


@pytest.mark.usefixtures("alone")
def test_a_collective_callback_may_not_communicate_where_rank_0_is_alone() -> None:
    class Telling(Callback):
        collective = True

        def on_checkpoint(self, outcome: Saved | SaveFailed) -> None:
            dist.barrier()

    with pytest.raises(UndeclaredCollective):
        Callbacks([Telling()]).on_checkpoint(SaveFailed(step=1, message="no space"))


@pytest.mark.usefixtures("alone")
def test_an_exception_is_raised_and_later_callbacks_are_not_called() -> None:
    journal: list[str] = []
    callbacks = Callbacks([Recording("a", journal), Broken(), Recording("b", journal)])

    with pytest.raises(ZeroDivisionError):
        callbacks.after_step(STEP, collective=False)

    assert journal == ["a: after 1"]
    dist.all_reduce(torch.ones(1))  # the guard is gone


# --- in the loop ------------------------------------------------------------------------------------------------------


def test_the_loop_calls_them_on_all_ranks_alike(tmp_path: Path) -> None:
    corpus = a_corpus(tmp_path)
    evaluation = {"every": 2, "sequences": 4, "sources": [{"name": "held-out", "uri": str(corpus / "held-out")}]}
    storage = {"path": str(tmp_path / "store")}
    config = a_config(
        corpus, {"steps": 3, "evaluation": evaluation}, checkpoint={"storage": storage, "interval": {"steps": 2}}
    )

    (first, reports), (second, _) = run_ranks(2, _trained, config, "record")

    saved = [line for line in first if "saved" in line]
    assert saved == ["a: saved 2", "b: saved 2", "a: saved 3", "b: saved 3"], "on rank 0 only"
    assert [line for line in first if line not in saved] == second
    assert second == [
        "a: before 1", "b: before 1", "a: after 1", "b: sum 3 after 1",
        "a: before 2", "b: before 2", "a: after 2", "a: evaluated 2", "b: evaluated 2", "b: sum 3 after 2",
        "a: before 3", "b: before 3", "a: after 3 last", "b: sum 3 after 3",
        "a: evaluated 3", "b: evaluated 3", "a: end 3", "b: end 3",
    ]  # fmt: skip
    assert isinstance(reports[-1], Finished)


def test_the_example_prints_the_norm_of_the_weights(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(a_config(a_corpus(tmp_path)).to_json())

    ended = subprocess.run([sys.executable, EXAMPLE, config], capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^step 6: norm \d+\.\d{4}$", ended.stdout, re.MULTILINE)


def test_a_broken_callback_ends_the_run(tmp_path: Path) -> None:
    config = a_config(a_corpus(tmp_path))

    assert run_ranks(1, _failed, config, "fail") == ["ZeroDivisionError: broken"]
    assert run_ranks(1, _failed, config, "ask")[0].startswith("UndeclaredCollective: callback Asking calls c10d.")


def _trained(environ: Mapping[str, str], config: TrainerConfig, kind: str) -> tuple[list[str], list[ReportBody]]:
    journal, link, rank = list[str](), FakeLink(), int(environ["RANK"])
    callbacks: dict[str, list[Callback]] = {
        "record": [Recording("a", journal), RecordingTogether("b", journal)],
        "fail": [Broken()],
        "ask": [Asking("after_step", lambda: dist.all_reduce(torch.ones(1)))],
    }
    store = FileCheckpointer(Path(config.checkpoint.storage.path or ""), 1, rank)
    train(config, link, lambda *_: store, Environment.of(environ), lambda _: callbacks[kind])
    return journal, link.reports


def _failed(environ: Mapping[str, str], config: TrainerConfig, kind: str) -> str:
    try:
        _trained(environ, config, kind)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it trained")
