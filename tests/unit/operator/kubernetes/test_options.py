"""The operator's flags, their environment, and what is wrong with them in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain_operator.kubernetes.server.options import BadOptions, Options, parse_options

NEEDED = ["--coordinator-host", "operator.system.svc"]


def test_one_flag_is_enough() -> None:
    assert parse_options(NEEDED) == Options(coordinator_host="operator.system.svc")


def test_every_flag_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "PRETRAIN_COORDINATOR_HOST": "host", "PRETRAIN_NAMESPACE": "team", "PRETRAIN_LISTEN": "127.0.0.1",
        "PRETRAIN_AGENTS_PORT": "1", "PRETRAIN_METRICS_PORT": "2", "PRETRAIN_PROBE_PORT": "3",
        "PRETRAIN_TLS_DIR": "/tls", "PRETRAIN_AUDIENCE": "a", "PRETRAIN_LEASE_NAME": "l", "PRETRAIN_LEASE_SECONDS": "7",
        "POD_NAME": "p", "POD_NAMESPACE": "n", "PRETRAIN_SERVICE_ACCOUNTS": "x, y", "PRETRAIN_DEFAULT_IMAGE": "i",
        "PRETRAIN_KUBECONFIG": "/k", "PRETRAIN_PROGRESS_SECONDS": "2.5",
    }  # fmt: skip

    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert parse_options([]) == Options(
        coordinator_host="host", namespace="team", listen="127.0.0.1", agents_port=1, metrics_port=2, probe_port=3,
        tls_dir=Path("/tls"), audience="a", lease_name="l", lease_seconds=7, progress_seconds=2.5,
        pod_name="p", pod_namespace="n", service_accounts=("x", "y"), default_image="i", kubeconfig=Path("/k"),
    )  # fmt: skip


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_AGENTS_PORT", "8")

    assert parse_options([*NEEDED, "--agents-port", "9"]).agents_port == 9


def test_an_empty_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_NAMESPACE", "team")
    options = parse_options([*NEEDED, "--namespace=", "--service-accounts=", "--pod-name=", "--tls-dir="])

    assert (options.namespace, options.service_accounts, options.pod_name, options.tls_dir) == (None, (), "", None)


def test_service_accounts_are_separated_by_commas() -> None:
    assert parse_options([*NEEDED, "--service-accounts=a, b"]).service_accounts == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--coordinator-host is missing"),
        ([*NEEDED, "--agents-port", "many"], "--agents-port: .*valid integer.*got 'many'"),
        ([*NEEDED, "--probe-port", "65536"], "--probe-port: .*65535.*got '65536'"),
        ([*NEEDED, "--lease-seconds", "0"], "--lease-seconds: .*greater than or equal to 1, got '0'"),
        ([*NEEDED, "--progress-seconds", "soon"], "--progress-seconds: .*valid number.*got 'soon'"),
        ([*NEEDED, "--colour", "blue"], "unrecognized arguments: --colour"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], says: str) -> None:
    with pytest.raises(BadOptions, match=says):
        parse_options(arguments)


def test_without_a_certificate_agents_connect_in_the_clear() -> None:
    assert parse_options(NEEDED).pod_settings().coordinator_url == "ws://operator.system.svc:8443"


def test_the_certificates_authority_goes_to_the_pods(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("the authority")

    settings = parse_options([*NEEDED, "--tls-dir", str(tmp_path), "--agents-port", "443"]).pod_settings()

    assert (settings.coordinator_url, settings.ca) == ("wss://operator.system.svc:443", "the authority")


def test_a_folder_without_a_certificate_is_named(tmp_path: Path) -> None:
    options = parse_options([*NEEDED, "--tls-dir", str(tmp_path)])

    with pytest.raises(BadOptions, match=r"--tls-dir: cannot read .*ca\.crt"):
        options.pod_settings()
