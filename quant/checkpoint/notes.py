"""ottava.json, our own notes beside config.json: the scheme's name, and what config.json cannot express.

Readers of compressed-tensors allow no extra keys, and servers refuse a kv_cache_scheme of int8: with one in config.json
vLLM would not load the folder.
"""

from __future__ import annotations

from typing import Any

from quant import __version__
from quant.checkpoint.targets import Quantization
from quant.errors import InvalidScheme
from quant.scheme import Scheme

NOTES_NAME = "ottava.json"


def notes_of(scheme: Scheme) -> dict[str, Any]:
    """The notes about a scheme, and the version that writes them."""
    return {
        "version": __version__,
        "scheme": scheme.name,
        "description": scheme.describe(),
        "alpha": scheme.smoothing,
        "outliers": scheme.outliers,
        "kv": scheme.kv,
        "rounding": scheme.rounding,
        "group_size": scheme.group_size,
        "is_distilled": scheme.is_distilled,
        "sink": list(scheme.sink),
        "is_rotated": scheme.is_rotated,
        "has_token_down": scheme.has_token_down,
    }


def _token_ids(noted: Any) -> tuple[int, ...]:
    """The tokens of a sink.

    Raises:
        InvalidScheme: it is no list.
    """
    if not isinstance(noted, list):
        raise InvalidScheme(f"sink = {noted!r} is not served; give a list of token ids")
    return tuple(noted)


def schemes_of(quantization: Quantization | None, notes: dict[str, Any]) -> tuple[Scheme, ...]:
    """One scheme for each format of the config, completed by the notes; scales per token for the last Linears of MLPs
    are a part of a static scheme that has them.

    Raises:
        InvalidScheme: the notes have a value that no scheme of that format takes.
    """
    name, has_token_down = notes.get("scheme"), notes.get("has_token_down", False)
    formats = quantization.formats if quantization is not None else ()
    if has_token_down:
        formats = tuple(each for each in formats if each.activation == "static")
    return tuple(
        Scheme(
            name if isinstance(name, str) else linear_format.name,
            linear_format.weight,
            linear_format.activation,
            smoothing=notes.get("alpha"),
            outliers=notes.get("outliers"),
            kv=notes.get("kv", "float"),
            rounding=notes.get("rounding", "nearest"),
            group_size=linear_format.group_size,
            is_distilled=notes.get("is_distilled", False),
            sink=_token_ids(notes.get("sink", [])),
            is_rotated=notes.get("is_rotated", False),
            has_token_down=has_token_down,
        )
        for linear_format in formats
    )
