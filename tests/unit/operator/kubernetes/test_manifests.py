"""What is created for a job: from its spec and its template to pods, configuration and network policy."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_agent.settings import parse_settings
from pretrain_api.messages.trainer_config import TrainerConfig
from pretrain_api.spec.job import PretrainJob
from pretrain_cli.inputs.job_file import load_job
from pretrain_operator.cluster import Placement
from pretrain_operator.kubernetes.workload import manifests
from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.kubernetes.workload.validation import InvalidSpec, parse_job, parse_status, problems
from support.kubernetes.jobs import SETTINGS, SPEC, UID, a_created_job, a_job_body, a_parsed_job

Object = dict[str, Any]
ROOT = Path(__file__).parents[4]
PLACEMENT = Placement(grace_seconds=42.5)


def a_pod(
    worker: Object | None = None,
    *,
    template: Object | None = None,
    placement: Placement = PLACEMENT,
    settings: PodSettings = SETTINGS,
    **parts: Any,
) -> Object:
    """The pod of worker 2, attempt 5; `worker` is what the template says of its container."""
    if worker is not None:
        template = {"spec": {"containers": [worker]}}
    return manifests.pod(a_parsed_job(template=template or {}, **parts), 2, 5, placement, settings)


def worker_of(pod: Object) -> Object:
    [found] = [container for container in pod["spec"]["containers"] if container["name"] == "worker"]
    return found


def environment(pod: Object) -> Object:
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in worker_of(pod)["env"]}


def mounts(pod: Object) -> Object:
    """Volume sources by the path at which the worker finds them."""
    sources = {volume["name"]: {k: v for k, v in volume.items() if k != "name"} for volume in pod["spec"]["volumes"]}
    return {mount["mountPath"]: sources[mount["name"]] for mount in worker_of(pod)["volumeMounts"]}


def test_the_agent_understands_its_command_line() -> None:
    command = worker_of(a_pod(settings=replace(SETTINGS, ca="")))["command"]

    settings = parse_settings(command[1:])

    assert command[0] == "pretrain-agent"
    assert settings.coordinator == f"wss://coordinator.system.svc:8443/v1/jobs/{UID}/agents"
    assert (settings.job_uid, settings.slot, settings.attempt) == (UID, 2, 5)
    assert (settings.host, settings.node, settings.http_port) == ("$(POD_IP)", "$(NODE_NAME)", 9400)
    assert (settings.processes, settings.grace) == (1, 42.5)
    assert settings.preload == ("pretrain_trainer.preload", "pretrain_trainer.preload_s3")
    assert (settings.program.target, settings.program.args) == ("pretrain_trainer", ("/etc/pretrain/trainer.json",))


def test_ranks_that_compile_start_with_the_compiler_imported() -> None:
    command = worker_of(a_pod(training=SPEC["training"] | {"compile": True}))["command"]

    assert parse_settings(command[1:]).preload[-1] == "pretrain_trainer.preload_compile"


def test_the_coordinators_certificate_is_checked_against_the_given_authority() -> None:
    job, command = a_parsed_job(), worker_of(a_pod())["command"]

    assert command[command.index("--ca-file") + 1] == "/etc/pretrain/ca.crt"
    assert manifests.config_map(job, SETTINGS)["data"]["ca.crt"] == "the authority\n"
    assert "--ca-file" not in worker_of(a_pod(settings=replace(SETTINGS, ca="")))["command"]


def test_the_configuration_is_what_the_trainer_reads() -> None:
    config_map = manifests.config_map(a_parsed_job(), SETTINGS)

    config = TrainerConfig.from_json(config_map["data"]["trainer.json"])

    assert config_map["immutable"] is True
    assert (config.job_name, config.job_uid, config.threads) == ("gpt2", UID, 1)
    assert config.cache.path == "/var/cache/pretrain"
    assert config.cache.bytes < SETTINGS.cache_bytes
    assert mounts(a_pod())["/etc/pretrain"] == {"configMap": {"name": config_map["metadata"]["name"]}}


def test_everything_belongs_to_the_job_and_does_not_hold_it_up() -> None:
    job = a_parsed_job()
    objects = (a_pod(), manifests.config_map(job, SETTINGS), manifests.network_policy(job))

    for made in objects:
        [owner] = made["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("PretrainJob", UID, True)
        assert owner["blockOwnerDeletion"] is False
        assert made["metadata"]["namespace"] == "team"
    assert [made["metadata"]["name"] for made in objects] == ["gpt2-0a1b2-2-5", "gpt2-0a1b2", "gpt2-0a1b2"]


def test_the_longest_name_and_the_highest_numbers_are_a_hostname() -> None:
    pod = manifests.pod(a_parsed_job(name="j" * 40), 9_999, 99_999, PLACEMENT, SETTINGS)

    assert len(pod["metadata"]["name"]) <= 63


def test_a_pod_is_restricted_when_the_template_says_nothing() -> None:
    pod = a_pod()

    assert pod["spec"]["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
        "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    assert worker_of(pod)["securityContext"] == {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True,
    }  # fmt: skip
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["restartPolicy"] == "Never"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()


def test_the_template_may_loosen_what_it_names() -> None:
    spec = {
        "hostNetwork": True,
        "securityContext": {"runAsUser": 1000, "fsGroup": None},
        "containers": [{"securityContext": {"readOnlyRootFilesystem": False}}],
    }

    pod = a_pod(template={"spec": spec})

    security = pod["spec"]["securityContext"]
    assert (security["runAsUser"], security["runAsNonRoot"]) == (1000, True)
    assert worker_of(pod)["securityContext"]["readOnlyRootFilesystem"] is False
    assert worker_of(pod)["securityContext"]["allowPrivilegeEscalation"] is False
    assert pod["spec"]["hostNetwork"] is True


def test_what_the_template_says_is_taken_over() -> None:
    spec = {
        "nodeSelector": {"gpu": "h200"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "priorityClassName": "training",
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "corpus"}}],
        "initContainers": [{"name": "fetch", "image": "fetcher:1"}],
        "containers": [
            {"name": "side", "image": "side:1"},
            {
                "name": "worker",
                "resources": {"limits": {"memory": "8Gi"}},
                "env": [{"name": "HF_HOME", "value": "/tmp/hf"}],
                "envFrom": [{"configMapRef": {"name": "extra"}}],
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                "ports": [{"name": "debug", "containerPort": 5678}],
                "imagePullPolicy": "Never",
            },
        ],
    }
    metadata = {"labels": {"team": "a"}, "annotations": {"note": "b"}}

    pod = a_pod(template={"metadata": metadata, "spec": spec})

    for key in ("nodeSelector", "tolerations", "priorityClassName", "initContainers"):
        assert pod["spec"][key] == spec[key]
    assert (pod["metadata"]["labels"]["team"], pod["metadata"]["annotations"]) == ("a", {"note": "b"})
    assert [container["name"] for container in pod["spec"]["containers"]] == ["worker", "side"]
    worker, own = worker_of(pod), spec["containers"][1]
    assert (worker["resources"], worker["envFrom"]) == (own["resources"], own["envFrom"])
    assert worker["imagePullPolicy"] == "Never"
    assert [port["name"] for port in worker["ports"]] == ["debug", "metrics"]
    assert mounts(pod)["/data"] == {"persistentVolumeClaim": {"claimName": "corpus"}}
    assert environment(pod)["HF_HOME"] == "/tmp/hf"


def test_a_template_is_not_changed_by_making_pods_from_it() -> None:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"env": [{"name": "A", "value": "1"}]}]}}
    before = copy.deepcopy(template)

    a_pod(template=template, placement=Placement(never=frozenset({"a"})))

    assert template == before


@pytest.mark.parametrize(
    ("containers", "extra"),
    [
        ([], []),
        ([{"resources": {}}], []),
        ([{"name": "main"}], []),
        ([{"name": "side", "image": "side:1"}], ["side"]),
        ([{"name": "side", "image": "side:1"}, {"resources": {}}], ["side"]),
        ([{"resources": {}}, {"name": "worker"}], [None]),
    ],
)
def test_the_workers_container_is_the_named_one_or_the_first_that_is_no_other(
    containers: list[Object], extra: list[str | None]
) -> None:
    pod = a_pod(template={"spec": {"containers": containers}})

    assert [container.get("name") for container in pod["spec"]["containers"]] == ["worker", *extra]


def test_workers_whose_gpus_hold_no_whole_replica_are_refused_with_numbers_that_do() -> None:
    gpus = {"limits": {"nvidia.com/gpu": 2}}
    template = {"spec": {"containers": [{"name": "worker", "resources": gpus}]}}
    training = {**a_job_body()["spec"]["training"], "parallelism": {"pipeline": 2, "tensor": 2}}

    with pytest.raises(InvalidSpec, match=r"3 workers of 2 hold no whole number of replicas: use 2 or 4"):
        a_parsed_job(workers={"replicas": 3, "template": template}, training=training)
    fitting = a_parsed_job(workers={"replicas": 4, "template": template}, training=training)
    assert fitting.spec.workers.processes_per_worker == 2


@pytest.mark.parametrize(
    ("workers", "resources", "processes"),
    [
        ({}, {}, "1"),
        ({}, {"limits": {"nvidia.com/gpu": 8}}, "8"),
        ({}, {"limits": {"nvidia.com/gpu": "4"}}, "4"),
        ({}, {"limits": {"nvidia.com/gpu": 0}}, "1"),
        ({"processesPerWorker": 2}, {"limits": {"nvidia.com/gpu": 8}}, "2"),
    ],
)
def test_there_is_a_process_for_each_gpu(workers: Object, resources: Object, processes: str) -> None:
    command = worker_of(a_pod({"resources": resources}, workers=workers))["command"]

    assert command[command.index("--processes") + 1] == processes


@pytest.mark.parametrize(
    ("image", "default_image", "used"),
    [
        (None, "", "pretrain-trainer:0.1.0"),
        (None, "registry.example/trainer:1", "registry.example/trainer:1"),
        ("mine:2", "registry.example/trainer:1", "mine:2"),
    ],
)
def test_the_installations_image_is_used_where_the_job_names_none(
    image: str | None, default_image: str, used: str
) -> None:
    workers = {"image": image} if image else {}

    pod = a_pod(workers=workers, settings=replace(SETTINGS, default_image=default_image))

    assert worker_of(pod)["image"] == used


def test_credentials_come_from_the_jobs_secret_and_from_nowhere_else() -> None:
    pod = a_pod({"env": [{"name": "AWS_ACCESS_KEY_ID", "value": "another"}]})

    names = [item["name"] for item in worker_of(pod)["env"]]
    assert names.count("AWS_ACCESS_KEY_ID") == 1
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert environment(pod)[name] == {"secretKeyRef": {"name": "s3-credentials", "key": name, "optional": False}}


def test_without_a_secret_the_templates_credentials_are_used() -> None:
    storage = {"storage": {"s3": {"bucket": "runs"}}}

    pod = a_pod({"env": [{"name": "AWS_ACCESS_KEY_ID", "value": "mine"}]}, checkpoint=storage)

    assert environment(pod)["AWS_ACCESS_KEY_ID"] == "mine"
    assert "AWS_SECRET_ACCESS_KEY" not in environment(pod)


def test_threads_are_one_unless_the_template_says_otherwise() -> None:
    four = {"spec": {"containers": [{"env": [{"name": "OMP_NUM_THREADS", "value": "4"}]}]}}
    plain, wide = a_parsed_job(), a_parsed_job(template=four)

    threads = [
        json.loads(manifests.config_map(job, SETTINGS)["data"]["trainer.json"])["threads"] for job in (plain, wide)
    ]
    assert threads == [1, 4]
    assert environment(a_pod())["OMP_NUM_THREADS"] == "1"
    assert [item["value"] for item in worker_of(a_pod(template=four))["env"] if item["name"] == "OMP_NUM_THREADS"] == [
        "4"
    ]


def test_what_programs_write_goes_to_volumes() -> None:
    pod = a_pod()

    assert environment(pod)["HOME"] == "/tmp"
    assert mounts(pod)["/tmp"] == {"emptyDir": {}}
    assert mounts(pod)["/var/cache/pretrain"] == {"emptyDir": {"sizeLimit": str(SETTINGS.cache_bytes)}}
    assert mounts(pod)["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_shared_memory_holds_a_checkpoint_twice() -> None:
    def room(preset: str) -> int:
        data = {"tokenizer": "s3://corpus/t.json", "sources": [{"name": "web", "uri": "s3://corpus/web"}]}
        training = {"model": {"preset": preset, "vocabulary": 50_257}, "data": data, "steps": 1}
        return int(mounts(a_pod(training=training))["/dev/shm"]["emptyDir"]["sizeLimit"])

    assert room("gpt2-124m") == 256 * 1024**2 + 2 * 12 * 124_439_808
    assert room("gpt2-124m") < room("gpt2-1.5b")


def test_shared_memory_holds_the_states_that_are_kept_in_memory() -> None:
    data = {"tokenizer": "s3://corpus/t.json", "sources": [{"name": "web", "uri": "s3://corpus/web"}]}
    training = {"model": {"preset": "gpt2-124m", "vocabulary": 50_257}, "data": data, "steps": 1}
    checkpoint = {"storage": {"s3": {"bucket": "runs"}}}

    def added(**parts: Any) -> int:
        """Bytes for `checkpoint.memory`."""
        workers = {"replicas": 4, "elastic": {"min": 4}, "processesPerWorker": 1}
        sizes = [
            mounts(a_pod(workers=workers, training=training | parts, checkpoint=checkpoint | memory))["/dev/shm"]
            for memory in ({}, {"memory": {}})
        ]
        without, with_memory = (int(size["emptyDir"]["sizeLimit"]) for size in sizes)
        return with_memory - without

    state = 12 * 124_439_808
    assert added() == 2 * (state + (2 << 20)), "two states, whole in every worker"
    assert added(parallelism={"shard": "full"}) == 2 * (state // 4 + (2 << 20)), "or a worker's share of two"
    assert added(parallelism={"tensor": 4}) == 2 * (state // 4 + (2 << 20)), "or what its tensor rank has"
    ends = 12 * ((50_257 + 1024) * 768 + 2 * 768)
    assert added(parallelism={"pipeline": 2}) == 2 * ((state - ends) // 2 + ends + (2 << 20)), "or its stage"


def test_a_container_that_cannot_hold_the_states_is_refused() -> None:
    def said(limit: str) -> tuple[str, ...]:
        container = {"name": "worker", "resources": {"limits": {"memory": limit}}}
        training = {
            "model": {"preset": "gpt2-124m"},
            "data": {"tokenizer": "s3://corpus/t.json", "sources": [{"name": "web", "uri": "s3://corpus/web"}]},
            "steps": 1,
        }
        checkpoint = {"storage": {"s3": {"bucket": "runs"}}, "memory": {}}
        template = {"spec": {"containers": [container]}}
        body = a_created_job(training=training, checkpoint=checkpoint, template=template)
        return problems(PretrainJob.model_validate(body, by_alias=True, by_name=False), SETTINGS)

    assert said("8Gi") == ()
    (problem,) = said("1Gi")
    assert problem.startswith("spec.checkpoint.memory: a worker keeps 1.9 GiB")
    assert "raise resources.limits.memory" in problem


@pytest.mark.parametrize("memory", ["1e99999999", "1e-99999999", "9" * 30, "much", "Infinity", "NaN", "sNaNM"])
def test_a_memory_limit_that_is_no_quantity_is_refused_before_it_is_computed(memory: str) -> None:
    container = {"name": "worker", "resources": {"limits": {"memory": memory}}}

    assert "resources.limits.memory" in refused(template={"spec": {"containers": [container]}})


@pytest.mark.parametrize("gpus", [10**18, "9" * 100, 1000])
def test_an_absurd_number_of_gpus_is_refused(gpus: object) -> None:
    container = {"name": "worker", "resources": {"limits": {"nvidia.com/gpu": gpus}}}

    assert "must be a whole number of GPUs, at most 999" in refused(template={"spec": {"containers": [container]}})


@pytest.mark.parametrize("path", ["/tmp", "/dev/shm", "/var/cache/pretrain", "/var/cache/pretrain/"])
def test_a_volume_of_the_templates_own_takes_the_place_of_ours(path: str) -> None:
    claim = {"name": "mine", "persistentVolumeClaim": {"claimName": "fast"}}
    worker = {"volumeMounts": [{"name": "mine", "mountPath": path}]}

    pod = a_pod(template={"spec": {"volumes": [claim], "containers": [worker]}})

    assert [m["name"] for m in worker_of(pod)["volumeMounts"] if m["mountPath"].rstrip("/") == path.rstrip("/")] == [
        "mine"
    ]
    assert len(pod["spec"]["volumes"]) == 5


def test_the_token_is_for_the_coordinator_only() -> None:
    [source] = mounts(a_pod())["/var/run/secrets/pretrain"]["projected"]["sources"]

    assert source["serviceAccountToken"] == {"audience": "pretrain", "expirationSeconds": 3600, "path": "token"}


def test_the_kubelet_waits_longer_than_the_agent() -> None:
    assert a_pod()["spec"]["terminationGracePeriodSeconds"] == 48
    longer = {"spec": {"terminationGracePeriodSeconds": 600}}
    assert a_pod(template=longer)["spec"]["terminationGracePeriodSeconds"] == 600


def test_workers_are_spread_over_nodes_unless_the_template_spreads_them() -> None:
    [spread] = a_pod()["spec"]["topologySpreadConstraints"]
    own = [{"maxSkew": 2, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}]

    assert (spread["maxSkew"], spread["topologyKey"], spread["whenUnsatisfiable"]) == (
        1, "kubernetes.io/hostname", "ScheduleAnyway",
    )  # fmt: skip
    assert spread["labelSelector"] == {"matchLabels": {"pretrain.dev/job-uid": UID}}
    assert a_pod(template={"spec": {"topologySpreadConstraints": own}})["spec"]["topologySpreadConstraints"] == own


REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def not_on(node: str) -> Object:
    return {"key": "metadata.name", "operator": "NotIn", "values": [node]}


def test_a_worker_is_kept_from_dead_nodes_and_rather_not_put_on_suspects() -> None:
    placement = Placement(never=frozenset({"b", "a"}), rather_not=frozenset({"c"}))

    node = a_pod(placement=placement)["spec"]["affinity"]["nodeAffinity"]

    assert node[REQUIRED] == {"nodeSelectorTerms": [{"matchFields": [not_on("a"), not_on("b")]}]}
    assert node[PREFERRED] == [{"weight": 100, "preference": {"matchFields": [not_on("c")]}}]


def test_the_templates_affinity_holds_as_well() -> None:
    zones = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]} for zone in "xy"]
    preferred = [{"weight": 1, "preference": zones[0]}]
    own = {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": zones}, PREFERRED: preferred}, "podAffinity": {"p": []}}

    affinity = a_pod(
        template={"spec": {"affinity": own}}, placement=Placement(never=frozenset({"a"}), rather_not=frozenset({"c"}))
    )["spec"]["affinity"]

    terms = affinity["nodeAffinity"][REQUIRED]["nodeSelectorTerms"]
    assert terms == [{**zone, "matchFields": [not_on("a")]} for zone in zones]
    assert affinity["nodeAffinity"][PREFERRED][0] == preferred[0]
    assert affinity["podAffinity"] == {"p": []}
    assert a_pod(template={"spec": {"affinity": own}})["spec"]["affinity"] == own


def test_only_a_jobs_own_workers_reach_each_other_and_anybody_their_metrics() -> None:
    spec = manifests.network_policy(a_parsed_job())["spec"]

    workers = {"matchLabels": {"pretrain.dev/job-uid": UID}}
    assert spec["podSelector"] == workers
    assert spec["policyTypes"] == ["Ingress"]
    assert spec["ingress"] == [
        {"from": [{"podSelector": workers}]},
        {"ports": [{"protocol": "TCP", "port": 9400}]},
    ]
    assert workers["matchLabels"].items() <= a_pod()["metadata"]["labels"].items()
    assert {"name": "metrics", "containerPort": 9400} in worker_of(a_pod())["ports"]


def refused(**parts: Any) -> str:
    with pytest.raises(InvalidSpec) as error:
        parse_job(a_created_job(**parts), SETTINGS)
    return str(error.value)


AT = "spec.workers.template.spec"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ({"spec": {"restartPolicy": "OnFailure"}}, f"{AT}.restartPolicy must be Never"),
        ({"spec": {"nodeName": "n"}}, f"{AT}.nodeName would pin every worker to one node"),
        ({"spec": {"serviceAccountName": "admin"}}, f"{AT}.serviceAccountName: 'admin' is not allowed: use one of"),
        ({"spec": {"serviceAccountName": ["default"]}}, f"{AT}.serviceAccountName: ['default'] is not allowed"),
        ({"spec": {"serviceAccount": "admin"}}, f"{AT}.serviceAccount is deprecated"),
        ({"spec": {"volumes": [{"name": "pretrain-tmp"}]}}, f"{AT}.volumes[0].name begins with pretrain-"),
        ({"spec": {"volumes": {"name": "a"}}}, f"{AT}.volumes must be a list of mappings"),
        ({"spec": {"containers": [1]}}, f"{AT}.containers must be a list of mappings"),
        ({"spec": []}, "spec.workers.template.spec must be a mapping"),
        ({"spec": {"securityContext": "root"}}, f"{AT}.securityContext must be a mapping"),
        ({"spec": {"affinity": {"nodeAffinity": []}}}, f"{AT}.affinity.nodeAffinity must be a mapping"),
        ({"spec": {"terminationGracePeriodSeconds": "60s"}}, f"{AT}.terminationGracePeriodSeconds must be a whole"),
        ({"metadata": {"finalizers": ["a/b"]}}, "template.metadata.finalizers cannot be used: only labels and ann"),
        ({"metadata": {"labels": {"pretrain.dev/slot": "1"}}}, "labels.pretrain.dev/slot is reserved for the operator"),
        ({"replicas": 3}, "spec.workers.template.replicas is unknown"),
    ],
)  # fmt: skip
def test_a_template_that_would_break_workers_is_refused(template: Object, says: str) -> None:
    assert says in refused(template=template)


@pytest.mark.parametrize(
    ("worker", "says"),
    [
        ({"command": ["sh"]}, "command is the agent's command line: remove it"),
        ({"args": ["-c"]}, "args is the agent's command line: remove it"),
        ({"image": "mine:1"}, "image is not used: set spec.workers.image"),
        ({"restartPolicy": "Always"}, "restartPolicy cannot be used"),
        ({"env": [{"name": "A"}, {"name": "MASTER_ADDR", "value": "x"}]}, "env[1]: MASTER_ADDR is set by the operator"),
        ({"env": "A=1"}, "env must be a list of mappings"),
        ({"env": [{"name": "OMP_NUM_THREADS", "value": "many"}]}, "env[0].value of OMP_NUM_THREADS must be a number"),
        ({"env": [{"name": "OMP_NUM_THREADS", "value": 4}]}, "env[0].value of OMP_NUM_THREADS must be a number"),
        ({"resources": {"limits": {"nvidia.com/gpu": "500m"}}}, "resources.limits.nvidia.com/gpu must be a whole"),
        ({"resources": {"limits": ["a"]}}, "resources.limits must be a mapping"),
        ({"volumeMounts": [{"name": "a", "mountPath": "/etc/pretrain/"}]}, "volumeMounts[0].mountPath is res"),
        ({"ports": [{"name": "metrics", "containerPort": 1}]}, "ports[0].name metrics is reserved for the agent"),
    ],
)  # fmt: skip
def test_a_container_that_would_break_the_worker_is_refused(worker: Object, says: str) -> None:
    assert f"{AT}.containers[1].{says}" in refused(
        template={"spec": {"containers": [{"name": "side", "image": "s"}, worker | {"name": "worker"}]}}
    )


@pytest.mark.parametrize(
    "name",
    ["PRETRAIN_X", "PET_NNODES", "TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE",
     "LOCAL_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "POD_IP", "NODE_NAME"],
)  # fmt: skip
def test_what_torchrun_and_the_agent_tell_ranks_is_reserved(name: str) -> None:
    worker = {"env": [{"name": name, "value": "1"}]}

    assert f"{name} is set by the operator or torchrun" in refused(template={"spec": {"containers": [worker]}})


def test_any_other_variable_is_the_users() -> None:
    assert environment(a_pod({"env": [{"name": "MY_RANK", "value": "1"}]}))["MY_RANK"] == "1"


def test_all_mistakes_are_told_at_once() -> None:
    said = refused(template={"spec": {"restartPolicy": "Always", "nodeName": "n"}})

    assert "restartPolicy" in said
    assert "nodeName" in said


@pytest.mark.parametrize("uri", ["data/web", "file:///data/web", "gs://corpus/web", "s3://", "s3:///web"])
def test_data_that_pods_cannot_reach_is_refused(uri: str) -> None:
    training = {
        "model": {"preset": "gpt2-tiny"},
        "data": {"tokenizer": "/data/tokenizer.json", "sources": [{"name": "web", "uri": uri}]},
        "steps": 1,
    }

    assert f"spec.training.data.sources[0].uri: '{uri}' is neither s3://BUCKET/… nor an absolute path" in refused(
        training=training
    )


def test_an_evaluation_in_a_file_that_pods_do_not_have_is_refused() -> None:
    training = {
        "model": {"preset": "gpt2-tiny"},
        "data": {"tokenizer": "/data/tokenizer.json", "sources": [{"name": "web", "uri": "/data/web"}]},
        "evaluation": {"sources": [{"name": "web", "uri": "/data/web"}], "hook": "mine.py:endings"},
        "steps": 1,
    }

    said = refused(training=training)
    assert "spec.training.evaluation.hook: 'mine.py' is not absolute: give package.module:function" in said


def test_a_relative_folder_for_checkpoints_is_refused() -> None:
    assert "spec.checkpoint.storage.path: 'checkpoints' is not absolute" in refused(
        checkpoint={"storage": {"path": "checkpoints"}}
    )


def test_checkpoints_must_outlive_the_pod() -> None:
    storage = {"storage": {"path": "/runs/gpt2"}}
    worker = {"volumeMounts": [{"name": "runs", "mountPath": "/runs"}]}
    template = {"spec": {"volumes": [{"name": "runs"}], "containers": [worker]}}

    assert "spec.checkpoint.storage.path: '/runs/gpt2' is on no volume" in refused(checkpoint=storage)
    assert a_parsed_job(checkpoint=storage, template=template).spec.checkpoint.storage.path == "/runs/gpt2"


def test_what_this_version_cannot_train_is_refused() -> None:
    training = {
        "model": {"preset": "gpt2-tiny"},
        "data": {"tokenizer": "s3://c/t.json", "sources": [{"name": "web", "uri": "s3://corpus/web"}]},
        "steps": 1,
        "precision": "fp8",
    }

    assert "spec.training.precision: fp8 is not supported yet" in refused(training=training)


def test_what_the_api_server_could_not_check_is_told_with_its_field() -> None:
    said = refused(recovery={"rules": [{"onLog": "(", "action": "Fail"}]})

    assert said.startswith("spec.recovery.rules[0]: onLog '(' is not a valid regular expression")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def mapping(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional={name: value | JSON for name, value in fields.items()}) | JSON


CONTAINER = mapping(
    name=st.sampled_from(["worker", "side"]),
    image=st.text(max_size=3),
    env=st.lists(mapping(name=st.sampled_from(["RANK", "OMP_NUM_THREADS", "A"]), value=st.text(max_size=3))),
    volumeMounts=st.lists(
        mapping(name=st.text(max_size=3), mountPath=st.sampled_from(["/tmp", "/etc/pretrain", "/a"]))
    ),
    resources=mapping(limits=st.fixed_dictionaries({"nvidia.com/gpu": JSON})),
    securityContext=mapping(runAsUser=JSON),
    ports=st.lists(mapping(name=JSON)),
)
TEMPLATE = st.fixed_dictionaries(
    {},
    optional={
        "metadata": mapping(labels=mapping(a=JSON), annotations=mapping(a=JSON)),
        "spec": mapping(
            containers=st.lists(CONTAINER, max_size=3),
            volumes=st.lists(mapping(name=st.text(max_size=9)), max_size=2),
            affinity=mapping(nodeAffinity=mapping(requiredDuringSchedulingIgnoredDuringExecution=JSON)),
            terminationGracePeriodSeconds=JSON,
            serviceAccountName=JSON,
        ),
    },
)


@settings(deadline=None)
@given(TEMPLATE)
def test_every_template_makes_a_pod_and_what_is_left_out_of_it_is_told(template: Object) -> None:
    job = PretrainJob.model_validate(a_created_job(template=template), by_alias=True, by_name=False)
    found = problems(job, SETTINGS)

    pod = manifests.pod(job, 0, 0, Placement(never=frozenset({"a"}), rather_not=frozenset({"b"})), SETTINGS)

    if found:
        assert all(AT.removesuffix(".spec") in problem for problem in found)
        return
    assert json.loads(json.dumps(pod)) == pod
    assert pod["spec"]["containers"][0]["command"][0] == "pretrain-agent"
    assert pod["spec"]["restartPolicy"] == "Never"


def test_a_status_of_another_version_is_read_as_far_as_it_is_known() -> None:
    status = {
        "phase": "Training",
        "step": 7,
        "invention": {"of": "a later version"},
        "bookkeeping": {"highestStep": 7, "tally": 3, "slots": [{"slot": 0, "attempt": 4, "mood": "good"}]},
        "goodput": {"ratio": "high", "seconds": {}},
    }
    body = a_created_job() | {"status": status}

    read = parse_status(body)

    assert (read.phase, read.step, read.goodput) == ("Training", 7, None)
    assert (read.bookkeeping.highest_step, read.bookkeeping.slots[0].attempt) == (7, 4)
    assert status["bookkeeping"]["tally"] == 3


def test_a_job_without_a_status_begins_with_an_empty_one() -> None:
    assert parse_status(a_created_job()).phase == "Pending"


def test_the_example_can_be_run() -> None:
    job = load_job(ROOT / "examples" / "pretrainjob.yaml")

    pods = [manifests.pod(job, slot, 0, PLACEMENT, SETTINGS) for slot in range(job.spec.workers.replicas)]

    assert problems(job, SETTINGS) == ()
    assert len(pods) == 3
    assert worker_of(pods[0])["resources"]["limits"] == {"memory": "8Gi"}
