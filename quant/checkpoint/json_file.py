"""Reads a JSON object from a file of a model folder. Knows no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError

MAX_BYTES = 1 << 28
"""Largest file that is read. The largest known, a tokenizer of 262,144 tokens, has 33 MB."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing or larger than MAX_BYTES, is not JSON, or holds something other than an
            object.
    """
    # A pipe would be waited for.
    if not path.is_file():
        what = "is no file" if path.exists() or path.is_symlink() else None
        raise CheckpointError(
            f"{path} {what}; download it again"
            if what
            else f"{path.parent} is not a model folder: it has no {path.name}"
        )
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {MAX_BYTES} are read: download it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content
