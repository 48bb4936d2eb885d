"""A real API server takes the CustomResourceDefinition and refuses what the parser refuses, in plain words."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from pretrain_api.spec.job import PretrainJob
from pretrain_api.status.job import Condition, Goodput, Incident, JobStatus, WorkerStatus
from support.kubernetes.api_server import RESOURCE, ApiServer, Refused
from support.worlds.bad_jobs import BAD_JOBS, GOOD, BadJob, with_changes


@pytest.fixture
def job(server: ApiServer) -> Iterator[str]:
    """The name of a job that exists."""
    server.kubectl("create", "-f", "-", given=GOOD)
    yield "good"
    server.kubectl("delete", RESOURCE, "good")


@pytest.mark.parametrize("bad", BAD_JOBS, ids=lambda bad: bad.name)
def test_a_bad_job_is_refused_with_the_rule_it_breaks(server: ApiServer, bad: BadJob) -> None:
    with pytest.raises(Refused) as refused:
        server.create(bad.document())

    assert bad.says in str(refused.value)


@pytest.mark.bare
def test_the_rules_let_good_jobs_pass(server: ApiServer) -> None:
    own = {"layers": 2, "heads": 4, "kvHeads": 2, "width": 32, "context": 32, "family": "llama"}
    training = "spec.training"

    four = {f"{training}.parallelism": {"tensor": 2, "pipeline": 2}, "spec.workers.replicas": 4}
    server.create(with_changes({f"{training}.model": own, **four}))
    server.create(with_changes({f"{training}.model": own, **four, "spec.workers.processesPerWorker": 3}))
    server.create(with_changes({f"{training}.model": {"preset": "gpt2-124m", "heads": 16}}))
    server.create(with_changes({f"{training}.schedule": {"kind": "wsd", "warmupSteps": 60, "decaySteps": 40}}))
    enough = with_changes({f"{training}.tokens": "20.48K", f"{training}.schedule": {"warmupSteps": 10}})
    del enough["spec"]["training"]["steps"]
    server.create(enough)
    enough["spec"]["training"]["tokens"] = 20480
    server.create(enough)


def test_the_servers_defaults_are_the_parsers(server: ApiServer) -> None:
    kept = server.create(GOOD)

    parsed, wanted = (PretrainJob.model_validate(document, by_alias=True, by_name=False) for document in (kept, GOOD))
    assert parsed.spec == wanted.spec
    written = json.loads(wanted.spec.model_dump_json(exclude_none=True))
    assert kept["spec"] == written


def test_the_pod_template_is_kept_as_written(server: ApiServer) -> None:
    template = {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"nvidia.com/gpu": 8}}}]}}

    assert server.create(with_changes({"spec.workers.template": template}))["spec"]["workers"]["template"] == template


def test_no_clipping_is_not_the_default_clipping(server: ApiServer) -> None:
    kept = server.create(with_changes({"spec.training.optimizer": {"clip": None}}))

    assert kept["spec"]["training"]["optimizer"]["clip"] is None


def test_an_unknown_field_is_refused(server: ApiServer) -> None:
    with pytest.raises(Refused, match=r'unknown field "spec\.workers\.replica"'):
        server.create(with_changes({"spec.workers": {"replica": 3}}))


def test_scaling_goes_through_the_scale_subresource(server: ApiServer, job: str) -> None:
    server.kubectl("scale", RESOURCE, job, "--replicas=3")

    assert server.kubectl("get", RESOURCE, job, "-o", "jsonpath={.spec.workers.replicas}") == "3"


def test_scaling_below_the_minimum_is_refused(server: ApiServer, job: str) -> None:
    patch = {"spec": {"workers": {"elastic": {"min": 2}, "replicas": 2}}}
    server.kubectl("patch", RESOURCE, job, "--type=merge", "-p", json.dumps(patch))

    with pytest.raises(Refused, match=r"replicas is less than elastic\.min"):
        server.kubectl("scale", RESOURCE, job, "--replicas=1")


def test_a_status_is_kept_whole_and_shown(server: ApiServer, job: str) -> None:
    status = JobStatus(
        phase="Training", generation=2, replicas=3, step=7, loss=2.5, tokens_per_second=12.5, selector="a=b",
        workers=(WorkerStatus(slot=0, attempt=1, state="Training", rank=0, pids={0: 42}),),
        validation_loss={"web": 2.5},
        goodput=Goodput(ratio=0.5, seconds={"training": 3.5}),
        incidents=(Incident(cause="WorkerLost", step=3),),
        conditions=(Condition(type="Ready", status="True", reason="Stepping", last_transition_time="2026-01-01"),),
    )  # fmt: skip
    wanted = json.loads(status.to_json())

    server.kubectl("patch", RESOURCE, job, "--subresource=status", "--type=merge", "-p", json.dumps({"status": wanted}))

    kept = json.loads(server.kubectl("get", RESOURCE, job, "-o", "json"))["status"]
    assert JobStatus.model_validate(kept) == status
    shown = server.kubectl("get", "ptj", job).splitlines()
    assert shown[0].split() == [
        "NAME", "PHASE", "STEP", "LOSS", "TOKENS/S", "WORKERS", "GENERATION", "GOODPUT", "AGE",
    ]  # fmt: skip
    assert shown[1].split()[:-1] == [job, "Training", "7", "2.5", "12.5", "3", "2", "0.5"]
