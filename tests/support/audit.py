"""Known vulnerabilities of pinned packages: `make audit`, and `make test-deploy` for those of the image.

    python -m tests.support.audit                                   # constraints.txt, by pip-audit
    python -m tests.support.audit --advisories FOLDER [FILE]        # by a checkout of pypa/advisory-database

pip-audit asks PyPI. Where that cannot be reached, a checkout of https://github.com/pypa/advisory-database stands for
it, and the date of its newest advisory is told. Exit code 1: something was found. 2: nothing could be asked, which is
no result.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.pages import ROOT

PINNED = re.compile(r"^([\w.-]+)==([\w.!]+)", re.MULTILINE)
"""Without the local version: it says that torch is a CPU build, and advisories know the public one."""

PUBLISHED = re.compile(r"^published: ['\"]?(\d{4}-\d\d-\d\d)", re.MULTILINE)


class NotAuditedError(Exception):
    """No advisories could be read, so nothing is known."""


@dataclass(frozen=True)
class Audit:
    """What was asked and found.

    source: whose advisories, and how new they are.
    known: how many of the packages it knows at all.
    found: "name version: id", sorted.
    """

    source: str
    known: int
    asked: int
    found: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source}: {self.known} of {self.asked} packages known to it, {len(self.found)} findings"


def packages_of(pins: str) -> dict[str, str]:
    """name -> version of the lines `name==version`; ottava itself is left out."""
    found = {canonicalize_name(name): version for name, version in PINNED.findall(pins)}
    return {name: version for name, version in found.items() if name != "ottava"}


def audit(packages: Mapping[str, str], advisories: Path | None) -> Audit:
    """By a checkout of advisories, or by pip-audit if there is none.

    Raises:
        NotAuditedError: neither gives a single advisory.
    """
    if not packages:
        raise NotAuditedError("there are no packages to ask for")
    return by_pip_audit(packages) if advisories is None else by_folder(packages, advisories)


def by_folder(packages: Mapping[str, str], folder: Path) -> Audit:
    """By the files `vulns/NAME/PYSEC-....yaml` of pypa/advisory-database.

    Raises:
        NotAuditedError: there are none.
    """
    dates = [date for path in folder.glob("vulns/*/*.yaml") for date in PUBLISHED.findall(path.read_text("utf-8"))]
    if not dates:
        raise NotAuditedError(f"{folder} holds no advisories: clone https://github.com/pypa/advisory-database")
    found, known = [], 0
    for name, version in packages.items():
        records = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(folder.glob(f"vulns/{name}/*.yaml"))]
        known += bool(records)
        found += [f"{name} {version}: {record['id']}" for record in records if is_affected(record, name, version)]
    source = f"{len(dates)} advisories of pypa/advisory-database, the newest of {max(dates)}"
    return Audit(source, known, len(packages), tuple(sorted(found)))


def is_affected(record: Mapping[str, Any], name: str, version: str) -> bool:
    """Whether a version is among those of an advisory. Source: OSV schema 1.6, "Evaluation"."""
    if "withdrawn" in record:
        return False
    return any(
        version in one.get("versions", ()) or any(_is_within(Version(version), events) for events in _ranges(one))
        for one in record.get("affected", ())
        if canonicalize_name(one["package"]["name"]) == name
    )


def _ranges(affected: Mapping[str, Any]) -> Iterator[list[dict[str, str]]]:
    """The ranges of versions; those of commits are left out."""
    for one in affected.get("ranges", ()):
        if one["type"] == "ECOSYSTEM":
            yield one["events"]


def _is_within(version: Version, events: Iterable[Mapping[str, str]]) -> bool:
    """Whether the last event that the version has reached began the fault."""
    is_inside = False
    for kind, at in sorted(((kind, Version(at)) for event in events for kind, at in event.items()), key=lambda e: e[1]):
        if kind == "introduced" and version >= at:
            is_inside = True
        elif (kind == "fixed" and version >= at) or (kind == "last_affected" and version > at):
            is_inside = False
    return is_inside


def by_pip_audit(packages: Mapping[str, str]) -> Audit:
    """By the program pip-audit, which asks PyPI for each package.

    Raises:
        NotAuditedError: it is missing, fails, or has an answer for no package.
    """
    if shutil.which("pip-audit") is None:
        raise NotAuditedError("pip-audit is missing in PATH: install it, or name a checkout of advisories")
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "requirements.txt"
        pins.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()), encoding="utf-8")
        command = ["pip-audit", "--no-deps", "--disable-pip", "--requirement", str(pins), "--format", "json"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        raise NotAuditedError(f"pip-audit failed: {done.stderr.strip()[-300:]}")
    asked = json.loads(done.stdout)["dependencies"]
    skipped = [package["skip_reason"] for package in asked if "skip_reason" in package]
    if len(skipped) == len(asked):
        raise NotAuditedError(f"pip-audit reached no advisories: {skipped[:1]}")
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}"
        for package in asked
        for flaw in package.get("vulns", ())
    ]
    return Audit("pip-audit", len(asked) - len(skipped), len(asked), tuple(sorted(found)))


def main(arguments: list[str] | None = None) -> int:
    """Audit a file of pins. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pins", type=Path, nargs="?", default=ROOT / "constraints.txt", help="lines `name==version`")
    parser.add_argument("--advisories", type=Path, help="checkout of pypa/advisory-database, instead of pip-audit")
    given = parser.parse_args(arguments)
    try:
        done = audit(packages_of(given.pins.read_text(encoding="utf-8")), given.advisories)
    except NotAuditedError as error:
        sys.stderr.write(f"NOT AUDITED: {error}\n")
        return 2
    sys.stdout.write("\n".join([str(done), *done.found]) + "\n")
    return 1 if done.found else 0


if __name__ == "__main__":
    sys.exit(main())
