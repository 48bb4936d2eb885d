"""`python -m tools.sbom FOLDER`: write CycloneDX bills of materials of both images and of the Helm chart.

They follow from the lock files, the workspace and the chart, without network and clock: the same sources give the same
bytes. The Debian packages of the base image are not listed one by one; the base is one component with its digest.
"""

# The decorators of cyclonedx hide the signatures and attributes of its classes from type checkers.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import argparse
import hashlib
import re
import tomllib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
CHART = ROOT / "charts" / "pretrain-operator"
IMAGES = {
    "operator": ("api", "operator"),
    "trainer": ("api", "store", "sdk", "data", "agent", "trainer"),
}
"""Workspace packages of each image."""
PLATFORM = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.0",
    "python_version": "3.11",
    "sys_platform": "linux",
}
"""Environment of the images, for the markers of requirements."""
_PIN = re.compile(
    r"(?P<name>[\w.-]+)==(?P<version>\S+)(?: ; (?P<marker>[^\\\n]+?))? \\\n(?P<hashes>(?:    --hash=.*\n?)+)"
)


@dataclass(frozen=True)
class LockedPackage:
    """A line of a lock file: a release and the digests of its files."""

    name: str
    version: str
    digests: tuple[str, ...]

    @property
    def ref(self) -> str:
        """Identifier of the component within a bill of materials."""
        return f"{self.name}=={self.version}"


def locked(lock: Path) -> Iterator[LockedPackage]:
    """Yield the packages of a lock file that are installed into the images."""
    for pin in _PIN.finditer(lock.read_text(encoding="utf-8")):
        requirement = Requirement(f"{pin['name']} ; {pin['marker']}" if pin["marker"] else pin["name"])
        if requirement.marker is None or requirement.marker.evaluate({**PLATFORM, "extra": ""}):
            digests = tuple(sorted(re.findall(r"sha256:([0-9a-f]{64})", pin["hashes"])))
            yield LockedPackage(canonicalize_name(pin["name"]), pin["version"], digests)


def image_bom(image: str, torch_lock: Path, base_image: str) -> Bom:
    """Return the bill of materials of an image, for this build of torch and this base."""
    locks = [ROOT / "requirements" / f"{image}.txt", *([torch_lock] if image == "trainer" else [])]
    third_party = {it.name: it for lock in locks for it in locked(lock)}
    components = {name: _third_party_component(it) for name, it in third_party.items()}
    components |= {f"pretrain-{name}": _workspace_component(name) for name in IMAGES[image]}
    version = _project(image)["version"]
    subject = Component(
        name=f"pretrain-{image}", version=version, type=ComponentType.CONTAINER, bom_ref=f"image:{image}"
    )
    bom = _bom(subject, [*components.values(), image_component(base_image)])
    bom.register_dependency(subject, bom.components)
    for name, needed in _edges(components).items():
        bom.register_dependency(components[name], [components[it] for it in sorted(needed)])
    return bom


def chart_bom() -> Bom:
    """Return the bill of materials of the chart: its files, and the images that it runs by default."""
    yaml = YAML(typ="safe", pure=True)
    chart = yaml.load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    values = yaml.load((CHART / "values.yaml").read_text(encoding="utf-8"))
    crd = (CHART / "files" / "crd.yaml").read_text(encoding="utf-8")
    images = [
        f"{values['image']['repository']}:{chart['appVersion']}",
        *re.findall(r"default: (pretrain-\S+:\S+)", crd),
    ]
    files = [_file_component(path) for path in sorted(CHART.rglob("*")) if path.is_file()]
    subject = Component(
        name=chart["name"],
        version=chart["version"],
        type=ComponentType.APPLICATION,
        description="Helm chart",
        bom_ref=f"chart:{chart['name']}",
    )
    bom = _bom(subject, [*files, *(image_component(image) for image in sorted(set(images)))])
    bom.register_dependency(subject, bom.components)
    return bom


def rendered(bom: Bom) -> str:
    """Return the bill of materials as JSON; its serial number is derived from the content."""
    bom.serial_number = uuid.UUID(int=0)
    content = JsonV1Dot6(bom).output_as_string()
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_OID, content)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def image_component(reference: str) -> Component:
    """Return the component of an image, with its digest where the reference has one."""
    tagged, _, digest = reference.partition("@sha256:")
    name, _, tag = tagged.rpartition(":")
    purl = PackageURL("oci", name=name.rpartition("/")[2], version=f"sha256:{digest}", qualifiers={"tag": tag})
    return Component(
        name=name,
        version=tag,
        type=ComponentType.CONTAINER,
        bom_ref=f"image:{reference}",
        purl=purl if digest else None,
        hashes=[_sha256(digest)] if digest else None,
    )


def _bom(subject: Component, components: Iterable[Component]) -> Bom:
    bom = Bom(components=components, metadata=BomMetaData(component=subject))
    bom.metadata.timestamp = None
    return bom


def _project(package: str) -> Mapping[str, str]:
    return tomllib.loads((ROOT / package / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _workspace_component(package: str) -> Component:
    project = _project(package)
    return Component(
        name=project["name"],
        version=project["version"],
        description=project["description"],
        bom_ref=f"{project['name']}=={project['version']}",
        purl=PackageURL("pypi", name=project["name"], version=project["version"]),
        licenses=[LicenseFactory().make_from_string(project["license"])],
    )


def _third_party_component(package: LockedPackage) -> Component:
    purl = PackageURL("pypi", name=package.name, version=package.version)
    files = ExternalReference(
        type=ExternalReferenceType.DISTRIBUTION,
        url=XsUri(purl.to_string()),
        comment="digests of the release's files; one of them is installed",
        hashes=map(_sha256, package.digests),
    )
    return Component(
        name=package.name,
        version=package.version,
        bom_ref=package.ref,
        purl=purl,
        licenses=_licenses(package),
        external_references=[files],
    )


def _licenses(package: LockedPackage) -> list[License]:
    """Return the licence that the installed release states, if it is the locked one."""
    found = _installed(package.name, package.version)
    if found is None:
        return []
    stated = found.get("License-Expression")
    if stated:
        return [LicenseFactory().make_from_string(stated)]
    classifiers = found.get_all("Classifier") or []
    names = [it.rpartition(" :: ")[2] for it in classifiers if it.startswith("License :: ")]
    return [LicenseFactory().make_with_name(name) for name in names]


def _edges(components: Mapping[str, Component]) -> dict[str, set[str]]:
    """Return, of each component, the others that its metadata requires."""
    requirements = {name: _requirements(name, it.version or "") for name, it in components.items()}
    extras: dict[str, set[str]] = {name: {""} for name in components}
    for requirement in (it for them in requirements.values() for it in them):
        extras.get(canonicalize_name(requirement.name), set()).update(requirement.extras)

    def applies(requirement: Requirement, of: str) -> bool:
        marker = requirement.marker
        return marker is None or any(marker.evaluate({**PLATFORM, "extra": it}) for it in extras[of])

    return {
        name: {str(canonicalize_name(it.name)) for it in them if applies(it, name)} & components.keys() - {name}
        for name, them in requirements.items()
    }


def _requirements(name: str, version: str) -> list[Requirement]:
    found = _installed(name, version)
    return [Requirement(it) for it in (found.get_all("Requires-Dist") or [])] if found is not None else []


def _installed(name: str, version: str) -> metadata.PackageMetadata | None:
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    return found if found["Version"] == version else None


def _file_component(path: Path) -> Component:
    name = path.relative_to(CHART).as_posix()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Component(name=name, type=ComponentType.FILE, bom_ref=f"file:{name}", hashes=[_sha256(digest)])


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(prog="python -m tools.sbom", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", type=Path, required=True, help="lock file of the build of torch")
    parser.add_argument("--base-image", required=True, help="base of the images, by digest for a release")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    boms = {f"pretrain-{image}": image_bom(image, given.torch, given.base_image) for image in IMAGES}
    for name, bom in {**boms, "pretrain-operator-chart": chart_bom()}.items():
        path = given.folder / f"{name}.cdx.json"
        path.write_text(rendered(bom), encoding="utf-8")
        print(f"{path}: {len(bom.components)} components")


if __name__ == "__main__":
    main()
