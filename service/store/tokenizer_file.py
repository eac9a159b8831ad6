"""Reads tokenizer.json, which alone defines a model's tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quant.checkpoint.json_file import MAX_BYTES
from service.errors import OttavaError, UnsupportedModel, first_line

FILE = "tokenizer.json"
PANIC = "PanicException"
"""The class of a panic of the library's code, which cannot be imported and is no Exception."""

PUTS_IN = {"Replace": "content", "Prepend": "prepend"}
"""Types of rules that put a text of their own into another, and its field."""

MAX_GROWTH = 64
"""Most characters that normalizer or decoder may put in place of one. Known ones put one: a "\u2581" for a space."""


@contextmanager
def library_faults(told_as: Callable[[str], OttavaError]) -> Iterator[None]:
    """Turn what the `tokenizers` library raises, a panic of its code too, into an error of ours.

    Args:
        told_as: makes that of the first line of what it says.
    """
    try:
        yield
    except BaseException as error:
        if not is_librarys(error):
            raise
        raise told_as(first_line(error)) from error


def is_librarys(error: BaseException) -> bool:
    """Whether an error that came out of a call of the library is its own: not ours, nor one that ends a task."""
    is_fault = isinstance(error, Exception) or type(error).__name__ == PANIC
    return is_fault and not isinstance(error, OttavaError)


def unusable(folder: Path, why: str) -> UnsupportedModel:
    """The error of a folder whose tokenizer.json is of no use."""
    return UnsupportedModel(f"{folder / FILE}: no usable tokenizer: {why}")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder's tokenizer.json, as the file has it.

    Neither a class of transformers that tokenizer_config.json names nor code of the model is involved: such a class
    replaces the file's own pre-tokenizer and normalizer, and the model was trained with those of the file.

    Raises:
        UnsupportedModel: the folder has no tokenizer.json that the `tokenizers` library can read, or one that is larger
            than MAX_BYTES or makes texts more than MAX_GROWTH times as long.
    """
    path = folder / FILE
    if not path.is_file():
        raise UnsupportedModel(f"{folder}: no usable tokenizer: it has no {FILE}; convert its tokenizer to one")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise unusable(folder, f"it has {size} bytes; at most {MAX_BYTES} are read: download it again")
    with library_faults(partial(unusable, folder)):
        tokenizer = Tokenizer.from_file(str(path))
    for name in ("normalizer", "decoder"):
        # Rules of a sequence follow each other.
        put_in = [rule[PUTS_IN[rule["type"]]] for rule in rules_of(getattr(tokenizer, name)) if rule["type"] in PUTS_IN]
        growth = math.prod(max(1, len(text)) for text in put_in)
        if growth > MAX_GROWTH:
            raise unusable(
                folder,
                f"its {name} puts {growth} characters in place of one, so that a short text fills the memory; at most "
                f"{MAX_GROWTH} are served",
            )
    # A tokenizer.json may contain settings from training, which would silently cut or pad texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def rules_of(part: Any) -> Iterator[dict[str, Any]]:
    """The rules of a tokenizer's normalizer or decoder as its file has them, sequences before what is in them.

    part: of the `tokenizers` library; None has no rules.
    """
    if part is not None:
        yield from _flat(json.loads(part.__getstate__()))


def _flat(rule: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield rule
    for each in rule.get("normalizers") or rule.get("decoders") or ():
        yield from _flat(each)
