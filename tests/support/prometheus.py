"""A real Prometheus that scrapes."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.ports import free_port
from support.tools import PROMETHEUS, require


@dataclass(frozen=True)
class Prometheus:
    """A server that scrapes."""

    url: str

    def query(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """The series of an instant query; raises ValueError with what is wrong with it."""
        values = {"query": expr} | ({"time": str(at)} if at is not None else {})
        return self._get("query", values)["result"]

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of a range query; raises ValueError with what is wrong with it."""
        values = {"query": expr, "start": str(start), "end": str(end), "step": str(step)}
        return self._get("query_range", values)["result"]

    def values_of(self, label: str, series: str) -> list[str]:
        """The values that a label has in some series."""
        return self._get(f"label/{label}/values", {"match[]": series})

    def rules(self) -> list[dict[str, Any]]:
        """The groups of rules."""
        return self._get("rules", {})["groups"]

    def _get(self, what: str, values: dict[str, str]) -> Any:
        address = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(values)}"
        try:
            with urllib.request.urlopen(address, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{values}: {json.load(error)['error']}") from error


@contextmanager
def prometheus(folder: Path, config: dict[str, Any]) -> Iterator[Prometheus]:
    """A server with this configuration, on a port of the loopback, until the end of the block."""
    port = free_port()
    (folder / "prometheus.json").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                require(PROMETHEUS)["prometheus"],
                f"--config.file={folder}/prometheus.json",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                "--query.lookback-delta=30s",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _wait_ready(f"http://127.0.0.1:{port}/-/ready", process, folder / "prometheus.log")
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def _wait_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(log.read_text())
