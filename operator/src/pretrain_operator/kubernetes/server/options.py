"""Options of the operator process: flags, each with an environment variable as its default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from pretrain_operator.kubernetes.leader.lease import DURATION_SECONDS
from pretrain_operator.kubernetes.workload.settings import PodSettings


class BadOptions(Exception):
    """Invalid options; the message names the flag and the fix."""


def _names(value: Any) -> Any:
    """Split a comma-separated list."""
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _none_if_empty(value: Any) -> Any:
    return None if value == "" else value


Port = Annotated[int, Field(ge=0, le=65_535)]
"""TCP port; 0: any free one."""
OptionalText = Annotated[str | None, BeforeValidator(_none_if_empty)]
OptionalPath = Annotated[Path | None, BeforeValidator(_none_if_empty)]


class Options(BaseModel):
    """Options of one operator process."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True)

    coordinator_host: str = Field(min_length=1, description="host name under which worker pods reach the operator")
    namespace: OptionalText = Field(default=None, description="the only namespace to serve; without it: all")
    listen: str = Field(default="", description="address to listen on; without it: all")
    agents_port: Port = Field(default=8443, description="port for the workers' agents")
    metrics_port: Port = Field(default=8080, description="port for /metrics and /readyz")
    probe_port: Port = Field(default=8081, description="port for /healthz")
    tls_dir: OptionalPath = Field(
        default=None, description="folder with tls.crt, tls.key and ca.crt; without it: no TLS, for tests only"
    )
    audience: str = Field(default="pretrain-operator", description="audience of the agents' tokens")
    lease_name: str = Field(default="pretrain-operator", description="Lease of the leader election")
    lease_seconds: int = Field(
        default=DURATION_SECONDS, ge=1, le=600, description="lease duration: a vanished leader is replaced after it"
    )
    progress_seconds: float = Field(
        default=5.0, ge=0.1, le=600, description="least time between status writes that carry progress only"
    )
    pod_name: str = Field(
        default="", validation_alias="POD_NAME", description="name of this replica's pod, labelled while it leads"
    )
    pod_ip: str = Field(default="", validation_alias="POD_IP", description="IP address of this replica's pod")
    pod_namespace: str = Field(
        default="default", validation_alias="POD_NAMESPACE", description="namespace of the operator and its Lease"
    )
    service_accounts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)] = Field(
        default=("default",), description="service accounts that jobs may use, comma-separated"
    )
    default_image: str = Field(default="", description="trainer image of jobs that name none")
    kubeconfig: OptionalPath = Field(
        default=None, description="without it: the cluster around this pod, else $KUBECONFIG's"
    )

    @property
    def address(self) -> str:
        """`host:port` at which this process answers probes; empty: unknown."""
        host = f"[{self.pod_ip}]" if ":" in self.pod_ip else self.pod_ip
        return f"{host}:{self.probe_port}" if host else ""

    def pod_settings(self) -> PodSettings:
        """Return the settings of worker pods. Reads the CA certificate; raises BadOptions."""
        scheme = "ws" if self.tls_dir is None else "wss"
        return PodSettings(
            coordinator_url=f"{scheme}://{self.coordinator_host}:{self.agents_port}",
            audience=self.audience,
            ca="" if self.tls_dir is None else _read(self.tls_dir / "ca.crt"),
            default_image=self.default_image,
            allowed_service_accounts=self.service_accounts,
        )


class _CommandLine(Options, BaseSettings):
    """Runs PretrainJobs on Kubernetes. Each flag defaults to an environment variable: PRETRAIN_ and the flag's name."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        validate_by_name=True,
        env_prefix="PRETRAIN_",
        cli_prog_name="pretrain-operator",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
    )


def parse_options(arguments: Sequence[str]) -> Options:
    """Return the options of a command line and the environment. Raises BadOptions."""
    try:
        given = _CommandLine(_cli_parse_args=list(arguments))  # pyright: ignore[reportCallIssue]
    except SettingsError as error:
        raise BadOptions(str(error.__cause__ or error)) from error
    except ValidationError as error:
        raise BadOptions("; ".join(_sentence(detail) for detail in error.errors(include_url=False))) from error
    return Options.model_validate(given.model_dump())


def _sentence(detail: Any) -> str:
    flag = f"--{str(detail['loc'][0]).lower().replace('_', '-')}" if detail["loc"] else "options"
    if detail["type"] == "missing":
        return f"{flag} is missing: set it, or ${'PRETRAIN_' + str(detail['loc'][0]).upper()}"
    return f"{flag}: {detail['msg']}, got {detail['input']!r}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise BadOptions(
            f"--tls-dir: cannot read {path} ({error.strerror}): mount the operator's certificate"
        ) from error
