"""Finds a model's tokenizer.json, or creates one from its older tokenizer files."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quant.checkpoint.model_config import read_config
from quant.errors import CheckpointError
from service.errors import UnsupportedModel, first_line
from service.store.tokenizer_file import FILE, read_tokenizer

OLDER = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer_config.json")
COMPANIONS = ("generation_config.json", "config.json", "chat_template.jinja", "chat_template.json")
"""Files that `service.text.tokenizer.Tokenizer` also reads, to be copied if the conversion has not written them."""

logger = logging.getLogger(__name__)


def tokenizer_folder(folder: Path, cache: Path) -> Path:
    """The folder with a model's tokenizer.json: its own, or if it has none, a converted one in the cache.

    Raises:
        UnsupportedModel: the folder has no tokenizer, or none that the `tokenizers` library supports.
    """
    if (folder / FILE).is_file():
        return folder
    out = cache / "tokenizers" / f"{folder.resolve().name}-{_fingerprint(folder)}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not out.is_dir():
            _convert(folder, out)
    return out


def text_tokenizer(folder: Path) -> Tokenizer:
    """What a model's texts are tokenized with for calibration and measurements: the same as for serving.

    Raises:
        UnsupportedModel: as `tokenizer_folder`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return read_tokenizer(tokenizer_folder(folder, Path(scratch)))


def _convert(folder: Path, out: Path) -> None:
    try:
        # Given the configuration, it reads none of another file that config.json names.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=read_config(folder), trust_remote_code=False, local_files_only=True
        )
    except CheckpointError as error:
        raise UnsupportedModel(str(error)) from error
    except Exception as error:  # What converts a tokenizer raises of a file that it does not expect is not limited.
        raise UnsupportedModel(f"{folder}: no usable tokenizer: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModel(f"{folder}: {type(tokenizer).__name__} has no fast form; convert it to a {FILE}")
    logger.info("%s has no %s; converting its older tokenizer files", folder, FILE)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / "made"
        tokenizer.save_pretrained(made)
        for name in COMPANIONS:
            if (folder / name).is_file() and not (made / name).is_file():
                shutil.copy(folder / name, made / name)
        made.rename(out)


def _fingerprint(folder: Path) -> str:
    """A hash of the files that a tokenizer is converted from."""
    digest = hashlib.sha256()
    for name in (*OLDER, *COMPANIONS):
        path = folder / name
        if path.is_file():
            status = path.stat()
            digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:12]
