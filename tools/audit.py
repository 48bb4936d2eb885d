"""`python -m tools.audit LOCK...`: look up known vulnerabilities of locked packages with pip-audit.

Exits 1 for a vulnerability, or for a package that could not be looked up. Where the service does not answer, prints one
line and exits 0, or 1 with --required. The probe is a release with a published advisory, which must come back with it:
some networks answer every look-up with "not found", which alone would read as "no vulnerabilities".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KNOWN_VULNERABLE = "requests==2.31.0"
"""A release with advisories since 2024."""
PROBE_TIMEOUT = 5
TIMEOUT = 30


class AuditFailed(Exception):
    """The service gave no answer; the text is pip-audit's."""


@dataclass(frozen=True)
class AuditService:
    """The vulnerability service that pip-audit asks: the package index, or one that speaks OSV's protocol."""

    osv_url: str | None = None

    def look_up(self, locks: Iterable[Path], *options: str, timeout: int) -> list[dict[str, Any]]:
        """Return pip-audit's entry of each package; raise AuditFailed if the service fails."""
        service = ["--vulnerability-service", "osv", "--osv-url", self.osv_url] if self.osv_url else []
        files = [word for lock in locks for word in ("--requirement", str(lock))]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "audit.json")
            command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--disable-pip"]
            command += ["--cache-dir", folder, "--timeout", str(timeout), "--format", "json", "--output", str(output)]
            done = subprocess.run([*command, *options, *service, *files], capture_output=True, text=True, check=False)
            if not output.exists() or not output.stat().st_size:
                raise AuditFailed(done.stderr.strip())
            return json.loads(output.read_text(encoding="utf-8"))["dependencies"]

    def answers(self) -> bool:
        """Decide whether the service knows the advisories of a release that has some."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "requirements.txt")
            probe.write_text(f"{KNOWN_VULNERABLE}\n", encoding="utf-8")
            try:
                found = self.look_up([probe], "--no-deps", timeout=PROBE_TIMEOUT)
            except AuditFailed:
                return False
        return any(it.get("vulns") for it in found)


def findings(packages: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line for each vulnerability and for each package that was not looked up."""
    lines: list[str] = []
    for it in packages:
        if "skip_reason" in it:
            lines.append(f"{it['name']}: not looked up: {it['skip_reason']}")
        for vulnerability in it.get("vulns", []):
            fixed = ", ".join(vulnerability["fix_versions"]) or "no release"
            lines.append(f"{it['name']} {it['version']}: {vulnerability['id']}, fixed in {fixed}")
    return sorted(set(lines))


def main() -> int:
    """Audit the lock files of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.audit", description=__doc__)
    parser.add_argument("locks", type=Path, nargs="+", metavar="LOCK")
    parser.add_argument("--osv-url", help="a service that speaks OSV's protocol, in place of the package index")
    parser.add_argument("--required", action="store_true", help="fail where the service does not answer")
    given = parser.parse_args()
    service = AuditService(given.osv_url)
    if not service.answers():
        print(f"audit {'failed' if given.required else 'skipped'}: the vulnerability service does not answer here")
        return 1 if given.required else 0
    try:
        packages = service.look_up(given.locks, "--require-hashes", timeout=TIMEOUT)
    except AuditFailed as failure:
        print(f"audit failed: {failure}")
        return 1
    found = findings(packages)
    print("\n".join([*found, f"{len(packages)} packages looked up, {len(found)} findings"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
