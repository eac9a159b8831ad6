"""Reads tokenizer.json, which alone defines a model's tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from service.errors import UnsupportedModel, first_line

FILE = "tokenizer.json"


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
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        raise UnsupportedModel(f"{folder}: no usable tokenizer: {first_line(error)}") from error
    # A tokenizer.json may contain settings from training, which would silently cut or pad texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
