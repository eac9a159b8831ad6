"""Reads tokenizer.json, which alone defines a model's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from service.errors import OttavaError, UnsupportedModel, first_line

FILE = "tokenizer.json"
PANIC = "PanicException"
"""The class of a panic of the library's code, which cannot be imported and is no Exception."""


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
        UnsupportedModel: the folder has no tokenizer.json that the `tokenizers` library can read.
    """
    path = folder / FILE
    if not path.is_file():
        raise UnsupportedModel(f"{folder}: no usable tokenizer: it has no {FILE}; convert its tokenizer to one")
    with library_faults(partial(unusable, folder)):
        tokenizer = Tokenizer.from_file(str(path))
    # A tokenizer.json may contain settings from training, which would silently cut or pad texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
