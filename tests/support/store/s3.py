"""A real S3 server (versitygw) that can be stopped and started again."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.ports import free_port
from support.tools import S3, require

ACCESS, SECRET = "pretrain-test", "pretrain-test-secret"


class Server:
    """A server over the folder `data`, whose folders are buckets; always at the same address."""

    def __init__(self, program: Path, data: Path) -> None:
        self.data = data
        self._program = program
        self._address = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self._address}"

    def environ(self, secret: str = SECRET) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": secret}

    def start(self, secret: str = SECRET) -> None:
        """Listen, and take only this secret."""
        command = [self._program, "--quiet", "--port", self._address, "--region", "us-east-1", "posix", self.data]
        environ = {**os.environ, "ROOT_ACCESS_KEY": ACCESS, "ROOT_SECRET_KEY": secret}
        self._process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
        host, _, port = self._address.partition(":")
        while True:
            assert self._process.poll() is None, "versitygw ended"
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
            except OSError:
                continue
            return

    def stop(self) -> None:
        """Kill the server and its connections. Its data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def s3_server(data: Path) -> Iterator[Server]:
    """A server that listens; skips the test where there is no program for it."""
    server = Server(require(S3)["versitygw"], data)
    server.start()
    try:
        yield server
    finally:
        server.stop()
