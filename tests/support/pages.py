"""The pages that a user reads, and the console blocks on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
QUICKSTART = ROOT / "docs" / "quickstart.md"
MANUAL = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [
    *MANUAL,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    ROOT / "kernels/README.md",
    ROOT / "benchmarks/NOTES.md",
    ROOT / "benchmarks/load/README.md",
]


@dataclass(frozen=True)
class Block:
    """A console block. reason: why no test runs it; None where one does."""

    page: str
    commands: tuple[str, ...]
    reason: str | None


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def console_blocks(page: Path) -> list[Block]:
    """The blocks of a page, their commands with continued lines joined; lines without `$ ` are output."""
    found = re.findall(r"(?:<!-- not run: ([^\n]+?) -->\n)?```console\n(.*?)```", text_of(page), re.DOTALL)
    return [Block(name_of(page), _commands(content), reason or None) for reason, content in found]


def _commands(content: str) -> tuple[str, ...]:
    joined = re.sub(r"\\\n\s*", "", content)
    return tuple(line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ "))
