"""The chart: what each toggle changes, against golden files; and what must hold whatever is toggled.

`UPDATE_GOLDEN=1 pytest tests/unit/charts/test_chart.py` rewrites the golden files; review the diff.
"""

from __future__ import annotations

import base64
import difflib
import json
import os
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.x509.oid import ExtensionOID

from pretrain_operator.kubernetes.server.options import parse_options
from support.kubernetes.chart import CHART, ROOT, Object, helm, objects, template

GOLDEN = Path(__file__).parent / "golden" / "chart"
EXISTING = "tls.source=existing,tls.secretName=our-certificate"
MONITORING = ("serviceMonitor", "podMonitor", "prometheusRule")

# One for each toggle, beside the defaults: what it adds, removes or changes is in its golden file.
TOGGLES: dict[str, tuple[str, ...]] = {
    "namespaced": ("watchNamespace=team-a",),
    "one-replica": ("replicas=1",),
    "tls-existing": (EXISTING,),
    "tls-cert-manager": ("tls.source=cert-manager",),
    "tls-cert-manager-own-issuer": (
        "tls.source=cert-manager",
        "tls.issuerRef.kind=ClusterIssuer,tls.issuerRef.name=corp",
    ),
    "no-crds": ("crds.install=false",),
    "crds-not-kept": ("crds.keep=false",),
    "no-rbac": ("rbac.create=false",),
    "no-aggregation": ("rbac.aggregate=false",),
    "service-account-given": ("serviceAccount.create=false", "serviceAccount.name=ours"),
    "no-network-policy": ("networkPolicy.enabled=false",),
    "no-disruption-budget": ("podDisruptionBudget.enabled=false",),
    "no-metrics-service": ("metrics.service=false",),
    **{kind: (f"metrics.{kind}.enabled=true", f"metrics.{kind}.labels.release=prometheus") for kind in MONITORING},
    "dashboards": ("grafana.dashboards.enabled=true",),
    "image-digest": (f"image.digest=sha256:{'0' * 64}", "image.repository=registry.example/pretrain-operator"),
    "worker-defaults": ("workers.image=registry.example/trainer:1", "workers.serviceAccounts={default,trainer}"),
    "own-env": ("env[0].name=POD_NAME,env[0].value=mine", "env[1].name=HTTPS_PROXY,env[1].value=http://proxy"),
    "port": ("service.port=9443",),
    "scheduling": ("nodeSelector.pool=system", "tolerations[0].operator=Exists", "priorityClassName=high"),
    "extra-objects": ("extraObjects[0].kind=ConfigMap,extraObjects[0].metadata.name=extra-{{ .Release.Name }}",),
}  # fmt: skip


@cache
def rendered(*settings: str) -> dict[str, Object]:
    """The objects by kind and name."""
    return objects(*settings)


def stable(found: dict[str, Object]) -> dict[str, Object]:
    """Without what is random or generated elsewhere: certificates, the CRD's schema, dashboards, alerts."""
    text = json.loads(json.dumps(found))
    for key, it in text.items():
        if key.startswith("Secret/"):
            it["data"] = sorted(it["data"])
        elif key.startswith("CustomResourceDefinition/"):
            it["spec"] = "as in crds/"
        elif key.endswith("-dashboard"):
            it["data"] = sorted(it["data"])
        elif key.startswith("PrometheusRule/"):
            it["spec"] = "as in alerts.yaml"
    return text


def difference(before: dict[str, Object], after: dict[str, Object]) -> Object:
    """The objects that are gone, new, or other than before, and of the last the lines that differ."""
    changed = sorted(key for key in before.keys() & after.keys() if before[key] != after[key])
    return {
        "removed": sorted(before.keys() - after.keys()),
        "changed": {key: _lines(before[key], after[key]) for key in changed},
        "added": {key: after[key] for key in sorted(after.keys() - before.keys())},
    }


def _lines(before: Object, after: Object) -> list[str]:
    def lines(it: Object) -> list[str]:
        return yaml.safe_dump(it, sort_keys=True).splitlines()

    return [line.rstrip() for line in difflib.ndiff(lines(before), lines(after)) if line[0] in "+-"]


def compare(name: str, found: Object) -> None:
    path = GOLDEN / f"{name}.yaml"
    text = yaml.safe_dump(found, sort_keys=True, width=120)
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path} says otherwise; if the change is meant: UPDATE_GOLDEN=1"


def test_the_defaults_render_as_ever() -> None:
    compare("defaults", stable(rendered()))


@pytest.mark.parametrize("toggle", TOGGLES)
def test_a_toggle_changes_what_it_should_and_nothing_else(toggle: str) -> None:
    compare(toggle, difference(stable(rendered()), stable(rendered(*TOGGLES[toggle]))))


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == {"defaults", *TOGGLES}


@pytest.mark.bare
def test_lint_has_nothing_to_say() -> None:
    ran = subprocess.run([helm(), "lint", "--strict", str(CHART)], capture_output=True, text=True, timeout=60)

    assert ran.returncode == 0, ran.stdout


def test_namespaced_mode_needs_no_right_outside_of_namespaces() -> None:
    kinds = {key.split("/")[0] for key in rendered("watchNamespace=team-a")}

    assert not kinds & {"ClusterRole", "ClusterRoleBinding"}


@pytest.mark.parametrize("settings", [(), ("watchNamespace=team-a",)], ids=["cluster-wide", "namespaced"])
def test_no_role_reads_secrets_or_takes_a_wildcard(settings: tuple[str, ...]) -> None:
    roles = [it for key, it in rendered(*settings).items() if key.startswith(("Role/", "ClusterRole/"))]
    rules = [rule for role in roles for rule in role["rules"]]

    assert rules
    for rule in rules:
        assert "secrets" not in rule["resources"]
        assert not any("*" in rule[part] for part in ("apiGroups", "resources", "verbs"))


@pytest.mark.parametrize("toggle", [(), *TOGGLES.values()], ids=["defaults", *TOGGLES])
def test_no_variable_is_given_twice(toggle: tuple[str, ...]) -> None:
    containers = rendered(*toggle)["Deployment/release-pretrain-operator"]["spec"]["template"]["spec"]["containers"]

    for container in containers:
        names = [variable["name"] for variable in container.get("env", ())]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("toggle", [(), *TOGGLES.values()], ids=["defaults", *TOGGLES])
def test_the_operator_takes_the_flags_that_it_is_given(toggle: tuple[str, ...]) -> None:
    [container] = rendered(*toggle)["Deployment/release-pretrain-operator"]["spec"]["template"]["spec"]["containers"]

    options = parse_options(container["args"])

    assert options.coordinator_host == "release-pretrain-operator-agents.pretrain-system.svc"
    assert {port["containerPort"] for port in container["ports"]} == {
        options.agents_port, options.metrics_port, options.probe_port,
    }  # fmt: skip


def test_the_certificate_is_for_the_name_that_workers_connect_to() -> None:
    data = rendered()["Secret/release-pretrain-operator-tls"]["data"]
    certificate, authority = (
        x509.load_pem_x509_certificate(base64.b64decode(data[key])) for key in ("tls.crt", "ca.crt")
    )
    names = certificate.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value

    certificate.verify_directly_issued_by(authority)
    assert isinstance(names, x509.SubjectAlternativeName)
    assert "release-pretrain-operator-agents.pretrain-system.svc" in names.get_values_for_type(x509.DNSName)


def test_what_is_installed_by_default_may_run_under_restricted_pod_security() -> None:
    for key in ("Deployment/release-pretrain-operator", "Pod/release-pretrain-operator-test"):
        it = rendered()[key]
        pod = it["spec"]["template"]["spec"] if it["kind"] == "Deployment" else it["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_the_limits_of_alerts_are_values_of_the_chart() -> None:
    settings = ("metrics.prometheusRule.enabled=true", "metrics.prometheusRule.limits.checkpointAgeSeconds=7200")
    spec = rendered(*settings)["PrometheusRule/release-pretrain-operator"]["spec"]
    expressions = {
        rule["record"]: rule["expr"] for group in spec["groups"] for rule in group["rules"] if "record" in rule
    }

    assert expressions["pretrain:limit_checkpoint_age:seconds"] == "7200"
    assert expressions["pretrain:limit_goodput:ratio"] == "0.7"
    written = yaml.safe_load((CHART / "alerts.yaml").read_text())
    assert [group["name"] for group in spec["groups"]] == [group["name"] for group in written["groups"]]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("replica=3", "replica"),
        ("tls.source=existing", "secretName"),
        ("tls.source=vault", "source"),
        ("image.digest=latest", "digest"),
        ("service.port=8080", "port"),
        ("watchNamespace=Team_A", "watchNamespace"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(setting: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        template(setting)


def test_every_value_is_in_the_schema() -> None:
    def check(values: Object, schema: Object, path: str) -> None:
        assert schema.get("additionalProperties") is False, f"{path} takes unknown values"
        for key, value in values.items():
            assert key in schema["properties"], f"{path}{key}"
            inner = schema["properties"][key]
            if isinstance(value, dict) and "properties" in inner:
                check(value, inner, f"{path}{key}.")

    check(
        yaml.safe_load((CHART / "values.yaml").read_text()), json.loads((CHART / "values.schema.json").read_text()), ""
    )


def test_the_charts_copy_of_the_crd_is_the_generated_one() -> None:
    [generated] = (ROOT / "crds").glob("*.yaml")

    assert (CHART / "files" / "crd.yaml").read_text() == generated.read_text(), "make generate"


def test_chart_and_operator_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "operator" / "pyproject.toml").read_text())["project"]

    assert chart["appVersion"] == project["version"]


@pytest.mark.parametrize(
    ("image", "packages"), [("operator", ("api", "operator")), ("trainer", ("api", "store", "agent", "trainer"))]
)
def test_an_images_requirements_are_what_its_packages_need(image: str, packages: tuple[str, ...]) -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=!~ ;]", line)[0].lower() for line in requirements}

    listed = (ROOT / "requirements" / f"{image}.in").read_text().splitlines()
    projects = [tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"] for package in packages]
    needed = {name for it in projects for name in names(it["dependencies"]) if not name.startswith("pretrain-")}

    assert needed <= names([line for line in listed if line and not line.startswith(("#", "-c"))])
