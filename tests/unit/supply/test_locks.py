"""Everything that is installed from elsewhere is pinned by a digest."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.documents import ROOT
from tools.sbom import locked

REQUIREMENTS = ROOT / "requirements"
LOCKS = sorted(REQUIREMENTS.glob("*.txt"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("lock", LOCKS, ids=lambda it: it.name)
def test_every_line_of_a_lock_file_is_one_release_with_its_digests(lock: Path) -> None:
    logical = lock.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    lines = [line for line in logical if not line.startswith("#")]

    assert lines
    assert [
        it for it in lines if not re.fullmatch(r"[\w.\[\]-]+==\S+( ; .+?)?( +--hash=sha256:[0-9a-f]{64})+", it)
    ] == []


def test_every_list_of_requirements_has_a_lock_file() -> None:
    assert {it.stem for it in REQUIREMENTS.glob("*.in")} | {"torch-cpu"} == {it.stem for it in LOCKS}


def test_every_install_checks_digests_unless_the_user_names_another_build_of_torch() -> None:
    lines = [*MAKEFILE.splitlines(), *DOCKERFILE.replace("\\\n", "").split("&&")]
    unchecked = [line for line in lines if re.search(r"\bpip\b.*\binstall\b", line) and "--require-hashes" not in line]

    assert [line for line in unchecked if "--no-deps" not in line and "set -- " not in line] == []
    assert [it for it in DOCKERFILE.splitlines() if '"${TORCH}"' in it] == [
        ' && if [ -n "${TORCH}" ]; then pip "$@" ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "${TORCH}"; \\'
    ]
    assert "ARG TORCH=\n" in DOCKERFILE
    assert re.search(r"^TORCH \?=$", MAKEFILE, re.MULTILINE)


def test_the_installer_is_the_locked_one() -> None:
    (uv,) = locked(REQUIREMENTS / "uv.txt")

    assert metadata.version("uv") == uv.version


def test_both_builds_of_torch_are_the_same_release() -> None:
    cpu = next(locked(REQUIREMENTS / "torch-cpu.txt"))
    index = {it.name: it for it in locked(REQUIREMENTS / "torch.txt")}["torch"]

    assert cpu.version.partition("+")[0] == index.version
    assert len(index.digests) > 1
    assert set(cpu.digests).isdisjoint(index.digests)


def test_the_wheel_of_torch_that_this_machine_has_is_the_locked_one() -> None:
    """Holds where pip's folder of wheels has it; other machines install the index's build."""
    config = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False
    )
    folders = [*os.environ.get("PIP_FIND_LINKS", "").split(), *config.stdout.split()]
    wheels = {it for folder in folders for it in Path(folder).glob("torch-*+cpu-cp311-*_x86_64.whl")}
    (torch,) = locked(REQUIREMENTS / "torch-cpu.txt")
    locked_wheels = [it for it in wheels if it.name.startswith(f"torch-{torch.version}-")]

    assert [it for it in locked_wheels if hashlib.sha256(it.read_bytes()).hexdigest() not in torch.digests] == []


def test_what_torch_needs_is_locked_with_it_and_at_the_version_of_the_other_locks() -> None:
    index = {it.name: it.version for it in locked(REQUIREMENTS / "torch.txt")}
    others = {it.name: it.version for name in ("dev", "trainer") for it in locked(REQUIREMENTS / f"{name}.txt")}
    needed = [Requirement(it) for it in metadata.requires("torch") or []]
    names = {canonicalize_name(it.name) for it in needed if it.marker is None or it.marker.evaluate({"extra": ""})}

    assert names <= index.keys()
    assert names <= {it.name for it in locked(REQUIREMENTS / "trainer.txt")}
    assert {name: version for name, version in index.items() if others.get(name, version) != version} == {}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Return a wheel in a folder of wheels."""
    path = tmp_path / "wheels" / "sample-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sample.py", "")
        archive.writestr("sample-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
        archive.writestr("sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("sample-1.0.dist-info/RECORD", "")
    return path


@pytest.mark.parametrize("installer", [("uv", "pip"), (sys.executable, "-m", "pip")], ids=("uv", "pip"))
@pytest.mark.parametrize("tampered", [False, True], ids=("intact", "tampered"))
def test_a_wheel_with_another_digest_is_not_installed(
    wheel: Path, tmp_path: Path, installer: tuple[str, ...], tampered: bool
) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock = tmp_path / "lock.txt"
    lock.write_text(f"sample==1.0 \\\n    --hash=sha256:{digest}\n")
    if tampered:
        with zipfile.ZipFile(wheel, "a") as archive:
            archive.writestr("implant.py", "")

    program = str(Path(sys.executable).with_name(installer[0])) if installer[0] == "uv" else installer[0]
    options = [
        "--no-index",
        "--find-links",
        str(wheel.parent),
        "--require-hashes",
        "--target",
        str(tmp_path / "target"),
    ]
    python = ["--python", sys.executable] if installer[0] == "uv" else []
    command = [program, *installer[1:], "install", *python, "--no-deps", *options, "-r", str(lock)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (tmp_path / "target" / "sample.py").exists() is not tampered, done.stderr
    assert (done.returncode != 0) is tampered


def test_the_release_s_base_image_has_a_digest_and_the_tag_that_the_dockerfile_defaults_to() -> None:
    base = (REQUIREMENTS / "base-image.Dockerfile").read_text(encoding="utf-8")
    (reference,) = re.findall(r"^FROM (\S+)$", base, re.MULTILINE)
    (default,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)

    assert re.fullmatch(re.escape(default) + r"@sha256:[0-9a-f]{64}", reference)
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE).count("${PYTHON_IMAGE}") == 2
    assert [it for it in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) if ":" in it] == []


def test_make_prints_the_base_image_for_the_build_argument() -> None:
    done = subprocess.run(
        ["make", "--silent", "--no-print-directory", "base-image"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}\n", done.stdout)
