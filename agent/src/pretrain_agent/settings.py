"""Command line of the agent."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

USAGE = "--coordinator URL --job-uid UID --slot N --attempt N [options] -- (-m MODULE | SCRIPT) ARGS..."


@dataclass(frozen=True)
class TrainingProgram:
    """The training program: a module (as in `python -m`) or the path of a script."""

    target: str
    is_module: bool
    args: tuple[str, ...]


class AgentOptions(BaseSettings):
    """Run one worker of a training job: join the generations that the coordinator forms.

    The training program follows the options: `-- -m MODULE ARGS...` or `-- SCRIPT ARGS...`.
    """

    model_config = SettingsConfigDict(
        frozen=True, cli_prog_name="pretrain-agent", cli_kebab_case=True, cli_avoid_json=True, cli_hide_none_type=True
    )

    coordinator: str = Field(description="WebSocket address of the coordinator, ws:// or wss://")
    job_uid: str = Field(description="UID of the PretrainJob")
    slot: int = Field(ge=0, description="this worker's place in the job, from 0")
    attempt: int = Field(ge=0, description="number of earlier starts of this slot")
    host: str = Field(default="127.0.0.1", description="address at which other workers reach this one")
    node: str = Field(default="", description="name of the machine")
    processes: int = Field(default=1, ge=1, description="training processes to start here")
    http_port: int = Field(default=0, ge=0, description="port of /metrics and /healthz; 0: any free port")
    preload: tuple[str, ...] = Field(
        default=(), description="module to import before ranks are forked; may be given again"
    )
    run_dir: Path | None = Field(
        default=None, description="folder for the ranks' output (logs/); absent: the agent's own output"
    )
    grace: float = Field(default=30.0, description="seconds after SIGTERM for a last checkpoint")
    token_file: Path | None = Field(default=None, description="file with the bearer token for the coordinator")
    ca_file: Path | None = Field(
        default=None, description="CA certificates (PEM) that sign the coordinator's certificate, for wss://"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the command line only: variables such as HOST and NODE belong to the machine."""
        return (init_settings,)


class AgentSettings(AgentOptions):
    """The parsed command line."""

    program: TrainingProgram


def parse_settings(argv: Sequence[str]) -> AgentSettings:
    """Parse the command line. On a mistake print it and exit with code 2."""
    own, separator, rest = list(argv), "--", list[str]()
    if separator in own:
        split = own.index(separator)
        own, rest = own[:split], own[split + 1 :]
    try:
        options = CliApp.run(AgentOptions, cli_args=own)
    except ValidationError as error:
        _refuse("; ".join(_mistake(detail) for detail in error.errors()))
    except SettingsError as error:
        _refuse(str(error))
    return AgentSettings(**dict(options), program=_program(rest))


def _program(rest: list[str]) -> TrainingProgram:
    is_module = rest[:1] == ["-m"]
    target = rest[1:] if is_module else rest
    if not target:
        _refuse("no training program: end the command with `-- SCRIPT.py ARGS...` or `-- -m MODULE ARGS...`")
    return TrainingProgram(target=target[0], is_module=is_module, args=tuple(target[1:]))


def _mistake(detail: Any) -> str:
    option = f"--{str(detail['loc'][0]).replace('_', '-')}"
    if detail["type"] == "missing":
        return f"{option} is required"
    if detail["type"] == "greater_than_equal":
        return f"{option} {detail['input']}: give {detail['ctx']['ge']} or more"
    return f"{option} {detail['input']}: {detail['msg']}"


def _refuse(message: str) -> NoReturn:
    print(f"usage: pretrain-agent {USAGE}\npretrain-agent: error: {message}", file=sys.stderr)
    raise SystemExit(2)
