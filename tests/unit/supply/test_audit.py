"""`make audit` against a vulnerability service on this machine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from support.documents import ROOT
from tools.audit import KNOWN_VULNERABLE

ADVISORY = {
    "id": "TEST-2024-1",
    "summary": "sends headers to the wrong host",
    "affected": [
        {
            "package": {"name": "requests", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.32.0"}]}],
        }
    ],
}
LOCK = "".join(f"{pin} \\\n    --hash=sha256:{'0' * 64}\n" for pin in ("idna==3.20", "torch==2.13.0"))


class VulnerabilityService:
    """Speaks the part of OSV's protocol that pip-audit uses."""

    def __init__(self) -> None:
        self.vulnerable = {KNOWN_VULNERABLE}
        self.failing: set[str] = set()

    async def answer(self, request: web.Request) -> web.Response:
        query: Any = json.loads(await request.text())
        release = f"{query['package']['name']}=={query['version']}"
        if release in self.failing:
            return web.Response(status=500)
        package = {"name": query["package"]["name"], "ecosystem": "PyPI"}
        affected = [{**ADVISORY["affected"][0], "package": package}]
        return web.json_response({"vulns": [{**ADVISORY, "affected": affected}]} if release in self.vulnerable else {})


@pytest.fixture
def service() -> VulnerabilityService:
    return VulnerabilityService()


@pytest.fixture
async def url(service: VulnerabilityService) -> AsyncIterator[str]:
    """Address of the service."""
    app = web.Application()
    app.router.add_post("/query", service.answer)
    async with TestServer(app) as server:
        yield str(server.make_url("/query"))


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "lock.txt"
    path.write_text(LOCK)
    return path


async def audit(url: str, lock: Path, *options: str) -> tuple[int, str]:
    """Return exit status and output of an audit."""
    command = [sys.executable, "-m", "tools.audit", "--osv-url", url, *options, str(lock)]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_packages_without_advisories_pass(url: str, lock: Path) -> None:
    assert await audit(url, lock) == (0, "2 packages looked up, 0 findings\n")


async def test_a_vulnerable_package_fails_with_the_release_that_fixes_it(
    service: VulnerabilityService, url: str, lock: Path
) -> None:
    service.vulnerable.add("idna==3.20")

    code, output = await audit(url, lock)

    assert code == 1
    assert "idna 3.20: TEST-2024-1, fixed in 2.32.0\n" in output


async def test_a_service_that_knows_no_advisory_at_all_does_not_count_as_an_answer(
    service: VulnerabilityService, url: str, lock: Path
) -> None:
    service.vulnerable.clear()

    assert await audit(url, lock) == (0, "audit skipped: the vulnerability service does not answer here\n")


async def test_an_absent_service_skips_with_one_line_or_fails_if_it_is_required(lock: Path) -> None:
    nowhere = f"http://127.0.0.1:{unused_port()}/query"

    assert await audit(nowhere, lock) == (0, "audit skipped: the vulnerability service does not answer here\n")
    assert await audit(nowhere, lock, "--required") == (
        1, "audit failed: the vulnerability service does not answer here\n",
    )  # fmt: skip


async def test_a_service_that_fails_in_between_fails_the_audit(
    service: VulnerabilityService, url: str, lock: Path
) -> None:
    service.failing.add("torch==2.13.0")

    code, output = await audit(url, lock)

    assert code == 1
    assert output.startswith("audit failed: ")


async def test_all_lock_files_of_the_make_target_can_be_audited_together(url: str) -> None:
    locks = [ROOT / "requirements" / f"{name}.txt" for name in ("uv", "dev", "torch")]
    audited = {str(path.relative_to(ROOT)) for path in locks}

    code, output = await audit(url, locks[0], *map(str, locks[1:]))

    assert code == 0, output
    assert audited <= set((ROOT / "Makefile").read_text().partition("\naudit:")[2].split())
