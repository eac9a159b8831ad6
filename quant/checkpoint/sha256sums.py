"""Checksums of the files of a folder: SHA256SUMS, which `sha256sum --check` reads too."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS_NAME = "SHA256SUMS"
READ = (".safetensors", ".json")


def write_sums(folder: Path) -> None:
    """Write the sums of all files of a folder and its subfolders into the folder."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        sums = pool.map(_sum, (folder / name for name in names))
        lines = [f"{found}  {name}\n" for found, name in zip(sums, names, strict=True)]
    (folder / SUMS_NAME).write_text("".join(lines), encoding="utf-8")


def first_damaged(folder: Path) -> str | None:
    """The first file of a folder that is missing, changed, or added and of a kind that models are read from, or None.

    Reads every byte once, several files at a time.
    """
    try:
        lines = (folder / SUMS_NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return SUMS_NAME
    listed = [(name, wanted) for wanted, _, name in (line.partition("  ") for line in lines)]
    names = {name for name, _ in listed}
    added = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.suffix in READ)
    if (unknown := next((name for name in added if name not in names), None)) is not None:
        return unknown
    if not listed:
        return SUMS_NAME
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_sum, (folder / name for name, _ in listed)))
    return next((name for (name, wanted), got in zip(listed, found, strict=True) if got != wanted), None)


def _sum(path: Path) -> str | None:
    """The sum of a file in hexadecimal; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None
