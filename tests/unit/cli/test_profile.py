"""A request for a profile on its way to the ranks, and the answer on its way back."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain_api.messages import reports
from pretrain_api.messages.profile_request import (
    ANNOTATION,
    InvalidProfile,
    InvalidRequest,
    ProfileRequest,
    parse_request,
    read_request,
)
from pretrain_api.messages.protocol import Command
from pretrain_api.status.job import JobStatus, Profile
from pretrain_cli.commands.profile import await_answer
from pretrain_cli.errors import BadInput
from pretrain_cli.targets.profile_target import ClusterJobTarget, ProfileUnanswered, profile_target
from pretrain_operator.cluster import Snapshot
from pretrain_operator.job.ports import JobListener
from pretrain_operator.job.service import JobService
from pretrain_operator.kubernetes.adapter.job_record import JobRecord
from pretrain_operator.local.run_folder import RunFolder
from pretrain_operator.projections.ledger import Ledger
from support.coordinator import a_running_world
from support.kubernetes.jobs import SETTINGS, a_created_job
from support.operator.world import (
    FakeChannel,
    FakeCluster,
    World,
    a_generation,
    a_job,
    a_restore,
    announced,
    said,
)

REQUEST = ProfileRequest("abc", steps=3, rank=1)
DONE = reports.Profiled(command_id="abc", rank=1, first_step=4, last_step=6, location="/store/x.json.gz", bytes=9)

# --- the request ---


def test_a_request_is_read_as_it_is_written() -> None:
    assert parse_request(REQUEST.text) == REQUEST
    assert parse_request("steps=3, rank=2") == ProfileRequest("steps-3-rank-2", 3, 2)
    assert parse_request("id=again") == ProfileRequest("again")
    assert read_request(" ") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps=0", "from 1 to 20"),
        ("steps=21", "from 1 to 20"),
        ("rank=-1", "rank must be a whole number"),
        ("id=a b", "letters, digits"),
        ("yes", "write steps=N,rank=R,id=TEXT"),
    ],
)
def test_what_is_no_request_is_answered_with_what_is(text: str, said: str) -> None:
    with pytest.raises(InvalidProfile, match=said):
        parse_request(text)
    answer = read_request(text)
    assert isinstance(answer, InvalidRequest)
    assert said in answer.message


# --- to the ranks ---


def commands(agent: object) -> list[Command]:
    return [command for command in agent.of(Command) if command.action == "profile"]  # type: ignore[attr-defined]


def test_each_generation_is_asked_once_until_there_is_an_answer() -> None:
    world, agents = a_running_world()
    world.set_want(profile=REQUEST)
    world.run(1)
    for agent in agents:
        (command,) = commands(agent)
        assert (command.id, command.steps, command.rank, command.generation) == ("abc", 3, 1, 1)

    world.kill(agents[2], pod_gone=True)
    world.run(3)
    assert [command.generation for command in commands(agents[0])] == [1, 2]

    world.set_want(profile=None)
    world.kill(agents[1], pod_gone=True)
    world.run(3)
    assert len(commands(agents[0])) == 2


def test_an_annotation_is_a_request_whenever_it_changes() -> None:
    body = a_created_job()
    record = JobRecord(None, body, SETTINGS)  # type: ignore[arg-type]
    assert record.profile is None

    for version, text in enumerate((REQUEST.text, "rank=1,id=next"), start=101):
        body["metadata"] |= {"annotations": {ANNOTATION: text}, "resourceVersion": str(version)}
        assert record.learn(body)
        assert record.profile == parse_request(text)

    body["metadata"]["resourceVersion"] = "200"
    assert not record.learn(body)


# --- and back ---


def test_an_answer_is_in_the_status_once_and_told() -> None:
    ledger = Ledger(JobStatus())
    recovery = a_job().spec.recovery
    ledger.record(announced(0, a_generation(1, (0, 0), (1, 0))), recovery)
    ledger.record(said(0, 1, a_restore(0)), recovery)

    events = [event for _ in range(2) for event in ledger.record(said(1, 1, DONE, slot=1), recovery).events]

    assert [event.reason for event in events] == ["ProfileSaved"]
    assert ledger.status().profiles == (
        Profile(id="abc", rank=1, first_step=4, last_step=6, location="/store/x.json.gz", bytes=9),
    )
    assert "abc" in ledger.view().answered_profiles


async def test_a_service_asks_until_it_is_answered_and_answers_nonsense_itself() -> None:
    world = World(a_job(2))
    cluster, channel = _Asking(world), FakeChannel(world)
    service = JobService(cluster, channel, JobListener(), lambda: world.now)

    cluster.request = read_request("nonsense")
    asked = await service.decide()
    assert asked.decision.want.profile is None
    await service.act(asked)
    assert ("Warning", "ProfileFailed") in [(event.type, event.reason) for event in world.events]
    assert "nonsense" in world.status.profiles[-1].message

    cluster.request = REQUEST
    assert (await service.decide()).decision.want.profile == REQUEST
    service.receive((said(1, 1, DONE),))
    assert (await service.decide()).decision.want.profile is None


class _Asking(FakeCluster):
    request: ProfileRequest | InvalidRequest | None = None

    async def snapshot(self) -> Snapshot:
        return replace(await super().snapshot(), profile=self.request)


# --- the command ---


def test_a_folder_in_which_nothing_runs_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "was"):
        pass

    for name, why in (("was", "no `pretrain run` is running"), ("never/was", "there is no folder")):
        with pytest.raises(BadInput, match=why):
            profile_target(str(tmp_path / name), None).ask(REQUEST)


def test_a_folder_in_use_is_asked_by_a_file_that_is_taken_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        found = profile_target(str(tmp_path), None)
        found.ask(REQUEST)
        assert [folder.take_request(), folder.take_request()] == [REQUEST.text, ""]
        folder.write_status(JobStatus(phase="Training", profiles=(Profile(id="abc", rank=1, location="x"),)))
        assert await_answer(found, REQUEST, 0.0, lambda: 0.0, lambda _: None).location == "x"

    with pytest.raises(ProfileUnanswered, match="has ended"):
        found.status()


def test_a_job_of_a_cluster_is_annotated_and_its_status_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"status": {"phase": "Training", "step": 9, "profiles": [{"id": "abc", "rank": 1, "location": "s3://x"}]}}
    (tmp_path / "answer").write_text(json.dumps(answer))
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/answer\n')
    kubectl.chmod(kubectl.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    found = profile_target("gpt2", "ml")
    found.ask(REQUEST)

    assert isinstance(found, ClusterJobTarget)
    assert await_answer(found, REQUEST, 0.0, lambda: 0.0, lambda _: None).location == "s3://x"
    assert (tmp_path / "asked").read_text().splitlines() == [
        "annotate pretrainjob gpt2 pretrain.dev/profile=steps=3,rank=1,id=abc --overwrite --namespace ml",
        "get pretrainjob gpt2 --output json --namespace ml",
    ]


def test_waiting_ends_with_the_patience_and_with_the_job() -> None:
    class Silent:
        phase = "Pending"

        def ask(self, request: ProfileRequest) -> None: ...

        def status(self) -> JobStatus:
            return JobStatus(phase=self.phase)  # type: ignore[arg-type]

    job, now = Silent(), [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(ProfileUnanswered, match="no answer within 5 s: the job is Pending"):
        await_answer(job, REQUEST, 5.0, lambda: now[0], sleep)
    job.phase = "Failed"
    with pytest.raises(ProfileUnanswered, match="has ended"):
        await_answer(job, REQUEST, 5.0, lambda: now[0], sleep)
