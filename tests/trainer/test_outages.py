"""Outages of a real S3 server: training waits, and no process ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pretrain_api.messages import reports
from pretrain_api.messages.reports import ReportBody
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_trainer.checkpoint import Checkpointer
from pretrain_trainer.core.environment import Environment
from pretrain_trainer.loop.train import train
from support.store.moto import CORPUS
from support.store.s3 import SECRET, Server, s3_server
from support.trainer.remote import RUNS, MendingLink, a_remote_config
from support.trainer.world import NoCheckpointer, a_config, a_corpus, run_ranks


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server with the corpus and a bucket for checkpoints."""
    data = tmp_path / "s3"
    (data / RUNS).mkdir(parents=True)
    (data / CORPUS).mkdir()
    a_corpus(data / CORPUS)
    with s3_server(data) as server:
        yield server


def in_s3(server: Server, every: int = 2) -> dict[str, Any]:
    storage = {"s3": {"bucket": RUNS, "prefix": "run", "endpoint": server.url}}
    return {"storage": storage, "interval": {"steps": every}}


class Act(MendingLink):
    """Does something at chosen reports: `acts` maps the kind and step of a report to what."""

    def __init__(self, acts: Mapping[tuple[str, int], Callable[[], object]], **menders: Callable[[], object]) -> None:
        super().__init__(menders=menders)
        self.acts = dict(acts)

    def report(self, body: ReportBody) -> None:
        act = self.acts.pop((body.kind, getattr(body, "step", 0)), None)
        if act is not None:
            act()
        super().report(body)


def steps(link: MendingLink) -> list[int]:
    return [body.step for body in link.reports if isinstance(body, reports.StepDone)]


@pytest.mark.bare
def test_saves_fail_during_an_outage_and_the_last_one_waits(server: Server) -> None:
    config = a_config(server.data / CORPUS, {"steps": 9}, checkpoint=in_s3(server))
    link = Act({("saved", 2): server.stop}, StorageUnavailable=server.start)

    train(config, link, Checkpointer.open, Environment.of(server.environ()))

    failed = [body.step for body in link.reports if isinstance(body, reports.SaveFailed)]
    assert steps(link) == list(range(1, 10))
    assert failed[-1] == 9, "the last save was tried in the outage"
    assert link.said == ["StorageUnavailable", "-"]
    assert isinstance(link.reports[-1], reports.Finished)


def test_a_save_after_the_outage_succeeds_as_does_the_search_for_later_records(server: Server) -> None:
    config = a_config(server.data / CORPUS, {"steps": 30}, checkpoint=in_s3(server))
    link = Act({("saved", 2): server.stop})
    failed, resumed = threading.Event(), threading.Event()

    def report(body: ReportBody) -> None:
        Act.report(link, body)
        if isinstance(body, reports.SaveFailed) and "still under way" not in body.message and not failed.is_set():
            failed.set()
            server.start()
        resumed.set() if failed.is_set() and isinstance(body, reports.Saved) else None

    link.report = report  # type: ignore[method-assign]
    train(config, link, Checkpointer.open, Environment.of(server.environ()))

    assert steps(link) == list(range(1, 31))
    assert (failed.is_set(), resumed.is_set()) == (True, True)


def test_credentials_that_are_refused_at_first_are_waited_for(server: Server) -> None:
    server.stop()
    server.start(secret="another")

    def repair() -> None:
        server.stop()
        server.start(SECRET)

    link = Act({}, AccessDenied=repair)
    train(
        a_config(server.data / CORPUS, checkpoint=in_s3(server)),
        link,
        Checkpointer.open,
        Environment.of(server.environ()),
    )

    assert link.said == ["AccessDenied", "-"]
    assert link.reports[0].message.startswith(f"s3://{RUNS}/run: ")
    assert steps(link) == [1, 2, 3, 4, 5, 6]


def test_a_server_that_is_down_at_the_start_is_waited_for(server: Server, tmp_path: Path) -> None:
    server.stop()
    link = Act({}, StorageUnavailable=server.start)

    train(
        a_remote_config(tmp_path, checkpoint=in_s3(server)), link, Checkpointer.open, Environment.of(server.environ())
    )

    assert link.said == ["StorageUnavailable", "-"]
    assert steps(link) == [1, 2, 3, 4, 5, 6]


def test_steps_wait_for_shards_that_cannot_be_fetched(server: Server, tmp_path: Path) -> None:
    undisturbed = Act({})
    train(a_config(server.data / CORPUS), undisturbed, lambda *_: NoCheckpointer(), Environment.of({}))
    config = a_remote_config(tmp_path, cache={"path": str(tmp_path / "cache"), "bytes": 6000})
    link = Act({("step", 2): server.stop}, StorageUnavailable=server.start)

    train(config, link, lambda *_: NoCheckpointer(), Environment.of(server.environ()))

    assert link.said == ["StorageUnavailable", "-"]
    assert link.losses == undisturbed.losses


def test_all_ranks_wait_for_an_outage_during_a_restore(server: Server, tmp_path: Path) -> None:
    config = a_config(server.data / CORPUS, {"parallelism": {"shard": "full"}}, checkpoint=in_s3(server))
    run_ranks(2, _train_on_ranks, config, server.environ(), 1, tmp_path)
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 8})})
    watch = threading.Thread(target=_stop_and_start, args=(server, tmp_path), daemon=True)
    watch.start()

    ends = run_ranks(2, _train_on_ranks, longer, server.environ(), 2, tmp_path)
    watch.join(60)

    assert ends == [(["StorageUnavailable", "-"], [7, 8]), ([], [])]


def _stop_and_start(server: Server, signs: Path) -> None:
    """Stop the server once the ranks have entered; start it when they say that they are blocked."""
    _until((signs / "entered").exists)
    server.stop()
    (signs / "stopped").touch()
    _until((signs / "blocked").exists)
    server.start()


def _until(holds: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not holds():
        pause.wait(0.02)


def _train_on_ranks(
    ranks: Mapping[str, str], config: TrainerConfig, environ: Mapping[str, str], number: int, signs: Path
) -> tuple[list[str], list[int]]:
    link = Act({}, StorageUnavailable=(signs / "blocked").touch)
    assert link.generation is not None
    link.generation = link.generation.model_copy(update={"number": number})

    def open_checkpointer(*arguments: Any) -> Checkpointer:
        checkpointer = Checkpointer.open(*arguments)
        if number == 2:
            (signs / "entered").touch()
            _until((signs / "stopped").exists)
        return checkpointer

    train(config, link, open_checkpointer, Environment.of({**ranks, **environ}))
    return link.said, steps(link)
