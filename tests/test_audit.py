"""`make audit`: versions against advisories, and no result where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.audit import NotAuditedError, audit, main, packages_of

ADVISORY = """
id: PYSEC-2026-1
affected:
- package: {name: Some.Package, ecosystem: PyPI}
  ranges:
  - type: GIT
    events: [{introduced: "0"}]
  - type: ECOSYSTEM
    events: [{introduced: "0"}, {fixed: 1.2.0}, {introduced: 2.0.0}, {last_affected: 2.1.0}]
  versions: [3.0.0]
published: "2026-01-31T00:00:00Z"
"""


@pytest.fixture
def advisories(tmp_path: Path) -> Path:
    """A checkout with one advisory that counts and one that was withdrawn."""
    folder = tmp_path / "vulns" / "some-package"
    folder.mkdir(parents=True)
    (folder / "PYSEC-2026-1.yaml").write_text(ADVISORY, encoding="utf-8")
    withdrawn = ADVISORY.replace("2026-1\n", "2025-9\n").replace("2026-01-31", "2025-01-01") + "withdrawn: 2026-02-01\n"
    (folder / "PYSEC-2025-9.yaml").write_text(withdrawn, encoding="utf-8")
    return tmp_path


def test_pins_are_read_without_ottava_and_without_local_versions() -> None:
    pins = "# text\nottava==0.2.0\nSome_Package==1.0\ntorch==2.13.0+cpu\n-e .\n"
    assert packages_of(pins) == {"some-package": "1.0", "torch": "2.13.0"}


@pytest.mark.parametrize(
    ("version", "is_affected"),
    [
        ("0.1", True), ("1.1.9", True), ("1.2.0rc1", True), ("1.2.0", False), ("1.10.0", False), ("2.0.0", True),
        ("2.1.0", True), ("2.1.1", False), ("3.0.0", True), ("3.0.1", False),
    ],
)  # fmt: skip
def test_a_version_is_affected_by_ranges_and_by_name(advisories: Path, version: str, is_affected: bool) -> None:
    done = audit({"some-package": version, "other": "1.0"}, advisories)
    assert done.found == ((f"some-package {version}: PYSEC-2026-1",) if is_affected else ())
    assert (done.known, done.asked) == (1, 2)


def test_the_age_of_the_advisories_is_told(advisories: Path) -> None:
    assert "the newest of 2026-01-31" in audit({"other": "1.0"}, advisories).source


def test_nothing_to_ask_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotAuditedError, match="holds no advisories"):
        audit({"other": "1.0"}, tmp_path)
    with pytest.raises(NotAuditedError, match="no packages"):
        audit({}, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotAuditedError, match="pip-audit is missing"):
        audit({"other": "1.0"}, None)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1"}]}]}', 1),
        ('{"dependencies": [{"name": "a", "skip_reason": "not found"}]}', 2),
        ("", 2),
    ],
)
def test_the_exit_code_tells_findings_from_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    pins = tmp_path / "pins.txt"
    pins.write_text("a==1\n", encoding="utf-8")
    assert main([str(pins)]) == code


def test_the_exit_code_of_a_checkout(advisories: Path) -> None:
    pins = advisories / "pins.txt"
    pins.write_text("some-package==1.0\n", encoding="utf-8")
    assert main([str(pins), "--advisories", str(advisories)]) == 1
