"""Programs from Debian packages, unpacked into the cache: nothing is installed or started."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_OPTIONS = ("-qq", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10")


def unpacked_package(package: str) -> Path | None:
    """Return the folder with the package's files; None where it cannot be downloaded."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain-operator" / package
    if cache.exists():
        return cache
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        return None
    cache.parent.mkdir(parents=True, exist_ok=True)
    with (cache.parent / f"{package}.lock").open("w") as lock:  # several test processes may ask at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if cache.exists() or _fetch(package, cache):
            return cache
        return None


def _fetch(package: str, to: Path) -> bool:
    with tempfile.TemporaryDirectory(dir=to.parent) as made:
        folder = Path(made)
        if not _download(package, folder):
            subprocess.run(["apt-get", "update", *_OPTIONS], capture_output=True, timeout=120)
            if not _download(package, folder):
                return False
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg", "-x", archive, folder / "unpacked"], check=True, timeout=120)
        (folder / "unpacked").rename(to)
    return True


def _download(package: str, to: Path) -> bool:
    command = ["apt-get", "download", *_OPTIONS, package]
    return subprocess.run(command, cwd=to, capture_output=True, timeout=180).returncode == 0
