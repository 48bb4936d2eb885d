"""Fetch the external programs of the tests into a cache: pinned versions, verified by digest.

    python3 tools/fetch_tools.py             # everything in pins.toml; exit code 1 if something is missing afterwards
    python3 tools/fetch_tools.py --for-tests # what `make test` lacks, if the network answers; exit code 0
    python3 tools/fetch_tools.py --where     # print the folder with the programs

Runs before `make install`: standard library only. TOOLS_MIRROR names another base address.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

PINS = Path(__file__).with_name("pins.toml")
PROBE_SECONDS = 3.0
STALL_SECONDS = 20.0
TESTS_SECONDS = 300.0
"""Longest that `make test` waits for downloads."""
_MACHINES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_BLOCK = 1 << 18


class FetchFailed(Exception):
    """A program that could not be fetched, and why."""


class Unreachable(FetchFailed):
    """The host did not answer."""


@dataclass(frozen=True)
class Pin:
    """One download: where it is, what it must hash to, which programs it holds."""

    name: str
    version: str
    url: str
    programs: Mapping[str, str]
    """Path in the archive by program."""
    algorithm: str
    digest: str
    tests: bool

    @property
    def folder(self) -> str:
        """Folder in the cache; another digest is another folder."""
        return f"{self.name}-{self.version}-{self.digest[:12]}"

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{self.name} {self.version}"


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Folder of everything that is fetched; its `bin` holds the programs."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain-operator" / "tools"


def this_platform() -> str:
    """Platform as pins name it, such as `linux-amd64`."""
    machine = platform.machine().lower()
    return f"{platform.system().lower()}-{_MACHINES.get(machine, machine)}"


def read_pins(path: Path, on: str, mirror: str = "") -> tuple[list[Pin], list[str]]:
    """Return the pins for a platform, and the names of those that have no digest for it."""
    system, _, arch = on.partition("-")
    words = {"os": system, "arch": arch, "System": system.title(), "machine": "x86_64" if arch == "amd64" else arch}
    pins: list[Pin] = []
    absent: list[str] = []
    for name, table in tomllib.loads(path.read_text()).items():
        algorithm = "sha512" if "sha512" in table else "sha256"
        known = words | {"version": table["version"]}
        url = table["url"].format(**known)
        if mirror:
            url = f"{mirror.rstrip('/')}/{name}/{table['version']}/{url.rpartition('/')[2]}"
        if on not in table[algorithm]:
            absent.append(name)
            continue
        programs = {program: member.format(**known) for program, member in table["programs"].items()}
        digest = table[algorithm][on]
        pins.append(Pin(name, table["version"], url, programs, algorithm, digest, table.get("tests", False)))
    return pins, absent


def fetch(pin: Pin, cache: Path, say: Callable[[str], None], deadline: float = float("inf")) -> None:
    """Download, verify and unpack unless the cache has it. Raises FetchFailed; then nothing of it is kept."""
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache), tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as made:
        if not is_cached(pin, cache):
            start = time.monotonic()
            download = Path(made) / "download"
            size = _download(pin, download, deadline)
            _unpack(pin, download, Path(made) / "programs")
            shutil.rmtree(cache / pin.folder, ignore_errors=True)
            (Path(made) / "programs").rename(cache / pin.folder)
            say(f"{pin.title}: {size / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
        _link(pin, cache, Path(made))


def is_cached(pin: Pin, cache: Path) -> bool:
    """Tell whether the cache has every program of a pin."""
    return all((cache / pin.folder / program).exists() for program in pin.programs)


def _download(pin: Pin, to: Path, deadline: float) -> int:
    """Write the file and return its size. Raises FetchFailed unless its digest is the pinned one."""
    digest, size, total = hashlib.new(pin.algorithm), 0, 0
    try:
        with urllib.request.urlopen(pin.url, timeout=STALL_SECONDS) as answer, to.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            while block := answer.read(_BLOCK):
                digest.update(block)
                size += file.write(block)
                _show_progress(pin, size, total)
                if time.monotonic() > deadline:
                    raise FetchFailed(
                        f"{pin.title}: too slow, {size / 1e6:.1f} MB so far; `make tools` has no time limit"
                    )
    except urllib.error.HTTPError as error:
        raise FetchFailed(f"{pin.title}: {pin.url} answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise Unreachable(f"{pin.title}: {pin.url}: {getattr(error, 'reason', error)}") from error
    except OSError as error:
        raise FetchFailed(f"{pin.title}: {to.parent.parent}: {error}") from error
    if size < total:
        raise Unreachable(f"{pin.title}: {pin.url} broke off after {size} of {total} bytes")
    if digest.hexdigest() != pin.digest:
        raise FetchFailed(
            f"{pin.title}: refused, the digest differs; nothing of {pin.url} is kept\n"
            f"  expected {pin.algorithm} {pin.digest}\n  actual   {pin.algorithm} {digest.hexdigest()}"
        )
    return size


def _show_progress(pin: Pin, size: int, total: int) -> None:
    if sys.stderr.isatty():
        share = f" of {total / 1e6:.1f}" if total else ""
        end = "\r\033[K" if size == total else "\r"
        print(f"{pin.title}: {size / 1e6:.1f}{share} MB", end=end, file=sys.stderr, flush=True)


def _unpack(pin: Pin, download: Path, to: Path) -> None:
    """Put the programs, and nothing else of an archive, into a new folder."""
    to.mkdir()
    if not pin.url.endswith((".tar.gz", ".tgz")):
        (program,) = pin.programs
        download.rename(to / program)
    else:
        try:
            with tarfile.open(download) as archive:
                for program, member in pin.programs.items():
                    source = archive.extractfile(member)
                    if source is None:
                        raise KeyError(f"{member} is no file")
                    with source, (to / program).open("wb") as file:
                        shutil.copyfileobj(source, file, _BLOCK)
        except (tarfile.TarError, KeyError) as error:
            raise FetchFailed(f"{pin.title}: {pin.url}: {error}") from error
    for program in pin.programs:
        (to / program).chmod(0o755)


def _link(pin: Pin, cache: Path, temporary: Path) -> None:
    """Make the programs in `bin` those of this pin, and delete those of other versions."""
    (cache / "bin").mkdir(exist_ok=True)
    for program in pin.programs:
        (temporary / program).symlink_to(Path("..") / pin.folder / program)
        os.replace(temporary / program, cache / "bin" / program)
    for old in cache.glob(f"{pin.name}-*"):
        if old.name != pin.folder:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Exclude other processes that fetch."""
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def answers(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Tell whether a server answers at this address within so many seconds, name look-up included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)  # the look-up of a name has no timeout of its own
    return answered.is_set()


def fetch_all(
    pins: Iterable[Pin], cache: Path, say: Callable[[str], None], deadline: float = float("inf")
) -> list[FetchFailed]:
    """Fetch what can be fetched and return what went wrong. A host that did not answer is not asked twice."""
    failures: list[FetchFailed] = []
    silent: set[str] = set()
    for pin in pins:
        host = urlsplit(pin.url).netloc
        if host in silent and not is_cached(pin, cache):
            failures.append(FetchFailed(f"{pin.title}: not tried, {host} did not answer"))
            continue
        try:
            fetch(pin, cache, say, deadline)
        except FetchFailed as failure:
            failures.append(failure)
            if isinstance(failure, Unreachable):
                silent.add(host)
    return failures


def lacking(pins: Iterable[Pin], cache: Path, environ: Mapping[str, str]) -> list[Pin]:
    """Return the pins that the tests need and that neither PATH, the cache nor a prebuilt cluster has."""
    if (prebuilt_cluster(environ) / "tools").exists():
        return []
    path = environ.get("PATH", os.defpath)
    return [
        pin
        for pin in pins
        if pin.tests
        and not is_cached(pin, cache)
        and not all(shutil.which(program, path=path) for program in pin.programs)
    ]


def prebuilt_cluster(environ: Mapping[str, str]) -> Path:
    """Folder of a prebuilt test cluster, which need not exist."""
    return Path(environ.get("PRETRAIN_TEST_CLUSTER") or PINS.parents[2] / "shared" / "cluster")


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Fetch the external programs of the tests.")
    parser.add_argument("--for-tests", action="store_true", help="what `make test` lacks; never fails")
    parser.add_argument("--where", action="store_true", help="print the folder with the programs")
    parser.add_argument("--pins", type=Path, default=PINS, help="versions, addresses and digests")
    options = parser.parse_args(arguments)
    cache = cache_folder(environ)
    if options.where:
        print(cache / "bin")
        return 0
    pins, absent = read_pins(options.pins, this_platform(), environ.get("TOOLS_MIRROR", ""))
    if options.for_tests:
        _fetch_for_tests(lacking(pins, cache, environ), cache)
        return 0
    for name in absent:
        _say(f"{name}: no digest is pinned for {this_platform()}; install it yourself")
    failures = fetch_all(pins, cache, _say)
    for failure in failures:
        _say(str(failure))
    if failures:
        _say("Fetch them on another machine and set TOOLS_MIRROR, or install them: tests that need them are skipped.")
    else:
        _say(f'All programs are there: export PATH="$PATH:{cache / "bin"}"')
    return 1 if failures else 0


def _fetch_for_tests(pins: list[Pin], cache: Path) -> None:
    if not pins:
        return
    names = ", ".join(pin.name for pin in pins)
    if not answers(pins[0].url):
        _say(f"{names}: no network to fetch them from; tests that need them are skipped")
        return
    for failure in fetch_all(pins, cache, _say, time.monotonic() + TESTS_SECONDS):
        _say(str(failure))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
