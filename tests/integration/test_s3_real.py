"""The contract of an ObjectStore against a real S3 server (versitygw), where the test cluster's binaries are there."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from store_contract import StoreContract

from pretrain_api.job import S3Storage, Storage
from pretrain_store.errors import Refused
from pretrain_store.open import open_store, probe
from pretrain_store.port import ObjectStore

CLUSTER = Path(os.environ.get("PRETRAIN_TEST_CLUSTER") or Path(__file__).parents[2].parent / "shared" / "cluster")
PREFIXES = itertools.count()
ACCESS, SECRET = "pretrain-test", "pretrain-test-secret"


@dataclass(frozen=True)
class Server:
    url: str
    data: Path

    def environ(self, secret: str = SECRET) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": secret}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not (CLUSTER / "tools").exists():
        pytest.skip(f"no test cluster at {CLUSTER}: set PRETRAIN_TEST_CLUSTER")
    tools = subprocess.run([CLUSTER / "tools"], check=True, capture_output=True, text=True).stdout.strip()
    data = tmp_path_factory.mktemp("s3")
    (data / "runs").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [Path(tools) / "versitygw", "--quiet", "--port", address, "--region", "us-east-1", "posix", data]
    environ = {**os.environ, "ROOT_ACCESS_KEY": ACCESS, "ROOT_SECRET_KEY": SECRET}
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until_it_listens(process, address)
            yield Server(f"http://{address}", data)
        finally:
            process.kill()


def wait_until_it_listens(process: subprocess.Popen[bytes], address: str) -> None:
    host, _, port = address.partition(":")
    while True:
        assert process.poll() is None, "versitygw ended"
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            continue
        return


@pytest.fixture
def store(server: Server) -> ObjectStore:
    storage = Storage(s3=S3Storage(bucket="runs", prefix=f"some/prefix-{next(PREFIXES)}"))
    return open_store(storage, server.environ())


class TestRealS3(StoreContract):
    pass


def test_a_wrong_secret_is_refused_with_the_storage_named(server: Server) -> None:
    store = open_store(Storage(s3=S3Storage(bucket="runs", prefix="job")), server.environ(secret="wrong"))

    with pytest.raises(Refused, match=r"checkpoint\.storage cannot be used: s3://runs/job"):
        probe(store)


def test_a_bucket_that_is_not_there_is_refused(server: Server) -> None:
    store = open_store(Storage(s3=S3Storage(bucket="absent", prefix="job")), server.environ())

    with pytest.raises(Refused, match=r"checkpoint\.storage cannot be used: s3://absent/job"):
        probe(store)
