"""`make tools`: what is fetched, verified, refused, and how it ends without a network."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tools.fetch_tools import PINS, PROBE_SECONDS, answers, cache_folder, read_pins, this_platform

ROOT = Path(__file__).parents[3]
PLATFORMS = ("linux-amd64", "linux-arm64", "darwin-amd64", "darwin-arm64")


@dataclass
class Mirror:
    """A server of files, and a list of digests for them."""

    folder: Path
    url: str
    asked: list[str]
    """Paths of the requests so far."""
    pins: str = ""
    environ: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, content: bytes, suffix: str = "", member: str = "", digest: str = "") -> None:
        """Offer a program and pin its digest, or another one."""
        path = self.folder / name / "v1" / f"{name}{suffix}"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        self.pins += (
            f'[{name}]\nversion = "v1"\ntests = true\nurl = "http://elsewhere.invalid/{name}{suffix}"\n'
            f'[{name}.programs]\n{name} = "{member or name}"\n'
            f'[{name}.sha256]\n{this_platform()} = "{digest or hashlib.sha256(content).hexdigest()}"\n'
        )

    def fetch(self, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the command with the machine's own Python."""
        pins = self.folder / "pins.toml"
        pins.write_text(self.pins)
        command = [sys.executable, ROOT / "tools" / "fetch_tools.py", f"--pins={pins}", *options]
        return subprocess.run(command, env=self.environ | environ, capture_output=True, text=True, timeout=120)

    @property
    def programs(self) -> Path:
        return cache_folder(self.environ) / "bin"


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    folder = tmp_path / "mirror"
    folder.mkdir()
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    environ = {
        "PATH": os.defpath,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TOOLS_MIRROR": url,
        "PRETRAIN_TEST_CLUSTER": str(tmp_path / "absent"),
    }
    try:
        yield Mirror(folder, url, asked, environ=environ)
    finally:
        server.shutdown()
        server.server_close()


def archive(**members: bytes) -> bytes:
    """A tar.gz file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def script(says: str) -> bytes:
    return f"#!/bin/sh\necho {says}\n".encode()


@pytest.mark.bare
def test_programs_are_fetched_verified_and_can_be_run(mirror: Mirror) -> None:
    mirror.add("plain", script("plain"))
    mirror.add("packed", archive(some__packed=script("packed"), evil=b"not wanted"), ".tar.gz", "some/packed")

    fetched = mirror.fetch()

    assert fetched.returncode == 0, fetched.stderr
    for name in ("plain", "packed"):
        assert subprocess.run([mirror.programs / name], capture_output=True, text=True).stdout == f"{name}\n"
    assert sorted(path.name for path in mirror.programs.iterdir()) == ["packed", "plain"]
    assert mirror.fetch("--where").stdout.strip() == str(mirror.programs)


def test_what_the_cache_has_is_not_fetched_again(mirror: Mirror) -> None:
    mirror.add("plain", script("plain"))
    mirror.fetch()
    before = list(mirror.asked)

    again = mirror.fetch()

    assert again.returncode == 0
    assert mirror.asked == before == ["/plain/v1/plain"]


def test_a_wrong_digest_is_refused_and_nothing_of_it_is_kept(mirror: Mirror) -> None:
    mirror.add("wrong", script("wrong"), digest="ab" * 32)
    mirror.add("right", script("right"))

    fetched = mirror.fetch()

    assert fetched.returncode == 1
    assert f"expected sha256 {'ab' * 32}" in fetched.stderr
    assert f"actual   sha256 {hashlib.sha256(script('wrong')).hexdigest()}" in fetched.stderr
    kept = [path for path in cache_folder(mirror.environ).rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.name for path in kept} == {"right"}


def test_another_digest_replaces_what_was_fetched_before(mirror: Mirror) -> None:
    mirror.add("plain", script("old"))
    mirror.fetch()
    shutil.rmtree(mirror.folder / "plain")
    mirror.pins = ""
    mirror.add("plain", script("new"))

    fetched = mirror.fetch()

    assert fetched.returncode == 0, fetched.stderr
    assert subprocess.run([mirror.programs / "plain"], capture_output=True, text=True).stdout == "new\n"
    assert len(list(cache_folder(mirror.environ).glob("plain-*"))) == 1


def test_an_archive_without_the_program_is_an_error_that_names_it(mirror: Mirror) -> None:
    mirror.add("packed", archive(other=b""), ".tar.gz", "some/packed")

    fetched = mirror.fetch()

    assert fetched.returncode == 1
    assert "some/packed" in fetched.stderr
    assert not (mirror.programs / "packed").exists()


def test_a_file_that_the_server_lacks_is_an_error_that_names_the_address(mirror: Mirror) -> None:
    mirror.add("plain", script("plain"))
    (mirror.folder / "plain" / "v1" / "plain").unlink()

    fetched = mirror.fetch()

    assert fetched.returncode == 1
    assert f"{mirror.url}/plain/v1/plain answers 404" in fetched.stderr


def test_a_platform_without_a_digest_is_said_and_passed_over(mirror: Mirror) -> None:
    mirror.add("plain", script("plain"))
    mirror.pins = mirror.pins.replace(this_platform(), "plan9-mips")

    fetched = mirror.fetch()

    assert fetched.returncode == 0
    assert f"plain: no digest is pinned for {this_platform()}" in fetched.stderr


def test_without_a_network_the_tests_get_one_line_and_no_error(mirror: Mirror) -> None:
    mirror.add("first", script("first"))
    mirror.add("second", script("second"))

    fetched = mirror.fetch("--for-tests", TOOLS_MIRROR="http://127.0.0.1:1")

    assert fetched.returncode == 0
    assert fetched.stderr == ("first, second: no network to fetch them from; tests that need them are skipped\n")


def test_for_the_tests_only_what_is_missing_is_fetched(mirror: Mirror, tmp_path: Path) -> None:
    mirror.add("here", script("here"))
    mirror.add("absent", script("absent"))
    on_path = tmp_path / "bin"
    on_path.mkdir()
    (on_path / "here").write_bytes(script("here"))
    (on_path / "here").chmod(0o755)

    fetched = mirror.fetch("--for-tests", PATH=f"{on_path}:{os.defpath}")

    assert fetched.returncode == 0, fetched.stderr
    assert [path.name for path in mirror.programs.iterdir()] == ["absent"]


def test_a_server_that_never_answers_holds_the_probe_up_for_three_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()

        assert not answers(f"http://127.0.0.1:{silent.getsockname()[1]}/")

        assert time.monotonic() - begin < PROBE_SECONDS + 10


def test_every_pin_has_a_digest_of_the_right_length_for_every_platform() -> None:
    for name in PLATFORMS:
        pins, absent = read_pins(PINS, name)

        assert {program for pin in pins for program in pin.programs} == {
            "etcd", "helm", "kind", "kube-apiserver", "kubectl", "versitygw",
        }  # fmt: skip
        assert not absent
        assert all(len(pin.digest) == {"sha256": 64, "sha512": 128}[pin.algorithm] for pin in pins)
        assert all("{" not in pin.url for pin in pins)


def test_a_real_program_comes_from_a_mirror_and_runs(mirror: Mirror, s3_program: Path) -> None:
    mirror.add("versitygw", s3_program.read_bytes())

    fetched = mirror.fetch("--for-tests")

    assert fetched.returncode == 0, fetched.stderr
    version = subprocess.run([mirror.programs / "versitygw", "--version"], capture_output=True, text=True)
    assert version.returncode == 0, version.stderr
