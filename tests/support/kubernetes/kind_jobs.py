"""Jobs on a real cluster: apply one, wait for what its status says, disturb its workers, compare its losses.

job = place.apply("gpt2", {"spec.workers.replicas": 4})
job.wait_for_step(40)
with job.fault("pod deleted"):
    job.delete_worker(0)
job.wait_for_phase("Succeeded")
assert job.losses_match(undisturbed)
"""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3

from pretrain_api.status.job import Incident, JobStatus, WorkerStatus
from support.kubernetes.kind import Cluster, Object, Refused, wait_until

STEPS = 300
TOLERANCE = 1e-5
CORPUS = "s3://corpus/e2e"
RUNS = itertools.count(1)

# The tiny job of the local tests, with so many sequences that a step takes some tenths of a second: then nearly every
# step is seen in the status. The learning rate is low, so that rounding differences between world sizes do not grow.
JOB: Object = {
    "apiVersion": "pretrain.dev/v1alpha1",
    "kind": "PretrainJob",
    "spec": {
        "workers": {
            "replicas": 3,
            "elastic": {"min": 1, "max": 5},
            "template": {
                "spec": {
                    "containers": [
                        {"name": "worker", "env": [], "resources": {"requests": {"cpu": "50m", "memory": "300Mi"}}}
                    ]
                }
            },
        },
        "training": {
            "model": {"family": "gpt2", "layers": 2, "heads": 2, "width": 64, "context": 64},
            "data": {
                "tokenizer": f"{CORPUS}/tokenizer.json",
                "sources": [
                    {"name": "words", "uri": f"{CORPUS}/words", "weight": 2},
                    {"name": "numbers", "uri": f"{CORPUS}/numbers", "weight": 1},
                ],
            },
            "steps": STEPS,
            "batch": {"sequences": 120, "microBatch": 4},
            "optimizer": {"learningRate": 1e-4},
            "schedule": {"kind": "constant", "warmupSteps": 5},
            "precision": "fp32",
        },
        "checkpoint": {"storage": {"s3": {"bucket": "checkpoints", "credentialsSecret": "s3-credentials"}},
                       "interval": {"steps": 20}},
    },
}  # fmt: skip


def job_document(name: str, endpoint: str, prefix: str, changes: Mapping[str, Any] | None = None) -> Object:
    """A job that is done in about a minute; `changes` are values at dotted paths, put last."""
    document = copy.deepcopy(JOB)
    document["metadata"] = {"name": name}
    document["spec"]["checkpoint"]["storage"]["s3"].update(endpoint=endpoint, prefix=prefix)
    worker = document["spec"]["workers"]["template"]["spec"]["containers"][0]
    worker["env"] = [{"name": "AWS_ENDPOINT_URL", "value": endpoint}]
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        at = document
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = value
    return document


@dataclass(frozen=True)
class Seen:
    """A status as it was seen."""

    at: float
    """By the monotonic clock."""
    status: JobStatus


@dataclass
class Fault:
    """What a test did to a job, and what it took to recover. Filled in by `Job.fault`."""

    name: str
    at: float = field(default_factory=time.monotonic)
    step: int = 0
    seconds_to_next_step: float | None = None
    """From the fault to the first status that tells of a step of a later generation: what a user sees."""
    incidents: tuple[Incident, ...] = ()
    steps_lost: int = 0


class Job:
    """A job on the cluster, watched from the moment it is made."""

    def __init__(self, cluster: Cluster, namespace: str, name: str, prefix: str) -> None:
        self.cluster, self.namespace, self.name, self.prefix = cluster, namespace, name, prefix
        self.history: list[Seen] = []
        self.faults: list[Fault] = []
        self._news = threading.Condition()
        self._closed = False
        self._watcher: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._watch, name=f"watch {namespace}/{name}", daemon=True)
        self._thread.start()

    # What is known

    @property
    def status(self) -> JobStatus:
        """The newest status that was seen."""
        return self.history[-1].status if self.history else JobStatus()

    @property
    def losses(self) -> dict[int, float]:
        """Step -> loss, as far as the status told them; of a step done again the last one counts. A restored job tells
        of the step that it goes on from, and still of the loss before: only steps that follow another one count, and
        losses that changed with them."""
        return {
            seen.status.step: seen.status.loss
            for before, seen in itertools.pairwise(self.history)
            if seen.status.loss is not None
            and seen.status.loss != before.status.loss
            and seen.status.step > before.status.step
        }

    def worker(self, slot: int) -> WorkerStatus:
        """The newest pod of a slot, as the status has it."""
        return next(worker for worker in self.status.workers if worker.slot == slot)

    def rank_zero(self) -> WorkerStatus:
        """The worker of rank 0, on whose node the generation's store is."""
        return next(worker for worker in self.status.workers if worker.rank == 0)

    def pods(self) -> list[Object]:
        """The job's pods."""
        return self.cluster.items("pods", "-n", self.namespace, "-l", f"pretrain.dev/job={self.name}")

    def pod(self, slot: int) -> str:
        """Name of the newest pod of a slot."""
        pods = [pod for pod in self.pods() if pod["metadata"]["labels"]["pretrain.dev/slot"] == str(slot)]
        return max(pods, key=lambda pod: int(pod["metadata"]["labels"]["pretrain.dev/attempt"]))["metadata"]["name"]

    def events(self) -> list[tuple[str, str]]:
        """(reason, message) of the job's Events, the oldest first."""
        found = self.cluster.items(
            "events", "-n", self.namespace, "--field-selector", f"involvedObject.name={self.name}"
        )
        return [(event["reason"], event["message"]) for event in sorted(found, key=lambda it: it["firstTimestamp"])]

    def condition(self, kind: str) -> tuple[str, str, str] | None:
        """(status, reason, message) of a condition."""
        return next(((it.status, it.reason, it.message) for it in self.status.conditions if it.type == kind), None)

    def logs(self, slot: int) -> str:
        """What a worker's pod printed."""
        return self.cluster.kubectl("logs", "-n", self.namespace, self.pod(slot))

    def describe(self) -> str:
        """The job's story, for people who look at a failed test."""
        parts = (("describe", f"pretrainjob/{self.name}"), ("get", "pods", "-o", "wide"),
                 ("logs", "-l", f"pretrain.dev/job={self.name}", "--prefix", "--tail=30"))  # fmt: skip
        texts: list[str] = []
        for part in parts:
            try:
                texts.append(self.cluster.kubectl(*part, "-n", self.namespace))
            except Refused as error:
                texts.append(str(error))
        return "\n".join(texts)

    # Waiting

    def wait(self, true: Callable[[JobStatus], object], what: str, timeout: float = 120.0) -> JobStatus:
        """The first status, from now on, of which `true` holds. Ends early when the job failed instead."""
        end = time.monotonic() + timeout
        with self._news:
            while not true(self.status):
                assert self.status.phase != "Failed", f"{self.status.reason}: {self.status.message}; waited for: {what}"
                left = end - time.monotonic()
                now = f"{self.status.phase}, step {self.status.step}, {self.status.message}"
                assert left > 0, f"not within {timeout:g} s: {what}; it is at: {now}"
                self._news.wait(left)
            return self.status

    def wait_for_step(self, step: int, timeout: float = 120.0) -> JobStatus:
        """Wait until so many steps are done."""
        return self.wait(lambda status: status.step >= step, f"step {step}", timeout)

    def wait_for_phase(self, phase: str, timeout: float = 180.0) -> JobStatus:
        """Wait for a phase: `Training`, `Suspended`, `Succeeded`, …"""
        return self.wait(lambda status: status.phase == phase, f"phase {phase}", timeout)

    def wait_for_workers(self, count: int, timeout: float = 120.0) -> JobStatus:
        """Wait until so many workers train together."""
        training = lambda status: sum(worker.rank is not None for worker in status.workers)  # noqa: E731
        return self.wait(lambda status: training(status) == count, f"{count} workers train", timeout)

    def wait_for_condition(self, kind: str, reason: str, timeout: float = 30.0) -> str:
        """Wait until a condition is true for a reason; returns its message."""
        held = lambda status: [  # noqa: E731
            it for it in status.conditions if (it.type, it.status, it.reason) == (kind, "True", reason)
        ]
        return held(self.wait(held, f"condition {kind} for {reason}", timeout))[0].message

    # Acting

    def patch(self, spec: Object) -> None:
        """Change fields of the spec."""
        text = json.dumps({"spec": spec})
        self.cluster.kubectl("patch", "pretrainjob", self.name, "-n", self.namespace, "--type=merge", "-p", text)

    def scale(self, replicas: int) -> None:
        """As a user does it."""
        self.cluster.kubectl("scale", "pretrainjob", self.name, "-n", self.namespace, f"--replicas={replicas}")

    def delete(self) -> None:
        """Delete the job and wait until it is gone."""
        self.cluster.kubectl("delete", "pretrainjob", self.name, "-n", self.namespace, "--ignore-not-found")

    def delete_worker(self, slot: int, *, force: bool = False) -> str:
        """Delete a worker's pod, with its grace or at once; returns its name."""
        pod = self.pod(slot)
        options = ("--grace-period=0", "--force") if force else ("--wait=false",)
        self.cluster.kubectl("delete", "pod", pod, "-n", self.namespace, *options)
        return pod

    def kill_rank(self, slot: int, signal: str = "KILL") -> None:
        """A signal for the training process of a worker."""
        wanted = set(self.worker(slot).pids.values())
        for process in self.cluster.processes(self.namespace, self.pod(slot)):
            if process.pid_in_pod in wanted:
                self.cluster.kill(process, signal)

    def kill_agent(self, slot: int, signal: str = "KILL") -> None:
        """A signal for the agent of a worker, its ranks apart."""
        processes = self.cluster.processes(self.namespace, self.pod(slot))
        agents = [it for it in processes if "pretrain-agent" in it.command and it.pid_in_pod != 1]  # 1 is its init
        assert agents, f"no agent among {[process.command for process in processes]}"
        for process in agents:
            self.cluster.kill(process, signal)

    @contextmanager
    def fault(self, name: str, timeout: float = 120.0) -> Iterator[Fault]:
        """What is done within disturbs the job: afterwards waits for a step of a later generation and measures."""
        fault = Fault(name, step=self.status.step)
        before, generation = len(self.status.incidents), self.status.generation
        self.faults.append(fault)
        yield fault

        def again(status: JobStatus) -> bool:
            return status.generation > generation and status.phase in ("Training", "Succeeded")

        self.wait(again, f"training again after: {name}", timeout)
        resumed = next(seen for seen in self.history if seen.at > fault.at and again(seen.status))
        fault.seconds_to_next_step = resumed.at - fault.at
        fault.incidents = self.status.incidents[before:]
        fault.steps_lost = sum(incident.steps_lost or 0 for incident in fault.incidents)

    def losses_match(self, other: Mapping[int, float]) -> bool:
        """Every step that both saw has the same loss within what another world size may change; enough are seen."""
        common = self.losses.keys() & other.keys()
        far = {step: (self.losses[step], other[step]) for step in common
               if abs(self.losses[step] - other[step]) > TOLERANCE * abs(other[step])}  # fmt: skip
        assert len(common) >= 10, f"only steps {sorted(common)} were seen in both runs"
        assert not far, f"losses differ: {far}"
        return True

    def close(self) -> None:
        """Stop watching."""
        self._closed = True
        if self._watcher is not None:
            self._watcher.kill()
        self._thread.join(10)

    def _watch(self) -> None:
        command = ["kubectl", "get", "pretrainjob", self.name, "-n", self.namespace, "--watch", "-o", "json"]
        while not self._closed:
            with subprocess.Popen(
                command,
                env=dict(self.cluster.environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            ) as self._watcher:
                assert self._watcher.stdout is not None
                for document in _documents(self._watcher.stdout):
                    with self._news:
                        status = JobStatus.model_validate(document.get("status") or {})
                        self.history.append(Seen(time.monotonic(), status))
                        self._news.notify_all()
            time.sleep(0.2)


def _documents(stream: Iterator[str]) -> Iterator[Object]:
    """kubectl prints one indented object after the other: each ends with a line that is a brace."""
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if line.rstrip() == "}":
            yield json.loads("".join(lines))
            lines = []


class Place:
    """A namespace of a test's own, with the credentials for S3."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.jobs: list[Job] = []
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        cluster.kubectl("create", "-f", "-", given=namespace)
        self.secret("s3-credentials")
        self._service_account()

    def secret(self, name: str) -> None:
        """Make a secret with the S3 service's credentials."""
        keys = {key: self.cluster.environment[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": keys}
        self.cluster.kubectl("create", "-n", self.name, "-f", "-", given=secret)

    def apply(self, name: str = "gpt2", changes: Mapping[str, Any] | None = None) -> Job:
        """Make a job with checkpoints of its own."""
        prefix = f"{self.name}/{name}-{next(RUNS)}"
        document = job_document(name, self.cluster.s3_endpoint, prefix, changes)
        self.cluster.kubectl("apply", "-n", self.name, "-f", "-", given=document)
        job = Job(self.cluster, self.name, name, prefix)
        self.jobs.append(job)
        return job

    def left_over(self) -> list[str]:
        """What jobs have left in the namespace."""
        kinds = "pretrainjobs,pods,configmaps,networkpolicies,services,leases"
        found = self.cluster.kubectl("get", kinds, "-n", self.name, "-o", "name").split()
        return [name for name in found if name != "configmap/kube-root-ca.crt"]

    def wait_until_empty(self) -> None:
        """Wait until nothing of any job is left in the namespace."""
        wait_until(lambda: self.left_over() == [] or None, f"nothing is left in namespace {self.name}")

    def checkpoints(self, job: Job) -> list[str]:
        """The keys of the manifests of a job's checkpoints."""
        environment = self.cluster.environment
        client = boto3.client(
            "s3", endpoint_url=self.cluster.s3_endpoint, region_name="us-east-1",
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip
        found = client.list_objects_v2(Bucket="checkpoints", Prefix=f"{job.prefix}/checkpoints/").get("Contents", [])
        return [it["Key"] for it in found if it["Key"].endswith("manifest.json")]

    def close(self) -> None:
        """Delete the namespace with all that is in it."""
        for job in self.jobs:
            job.close()
        self.cluster.kubectl("delete", "pretrainjobs", "--all", "-n", self.name, "--timeout=60s")
        self.cluster.kubectl("delete", "pods", "--all", "-n", self.name, "--grace-period=0", "--force", "--wait=false")
        self.cluster.kubectl("delete", "namespace", self.name, "--wait=false")

    def _service_account(self) -> None:
        """Pods are refused until the namespace's service account is there."""

        def there() -> bool:
            return "default" in self.cluster.kubectl("get", "serviceaccounts", "-n", self.name, "-o", "name")

        wait_until(there, f"the service account of namespace {self.name}")
