"""Creates the int8 checkpoint of a float model, keeps it in the cache, and verifies it at each start."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from quant import __version__
from quant.checkpoint.json_file import read_json
from quant.checkpoint.notes import NOTES_NAME
from quant.checkpoint.sha256sums import first_damaged
from quant.convert.layer import Recipe
from quant.convert.massive import noted_tokens
from quant.convert.model import quantize_checkpoint, refuse_occupied
from quant.errors import InvalidScheme, Unquantizable
from quant.scheme import Scheme
from service.errors import UnsupportedModel
from service.models.config import ModelConfig, down_names, linear_names, qkv_names, smooth_groups, stream_of
from service.models.loader import load_decoder
from service.store.calibration import Calibration, calibration_windows
from service.store.progress import Progress, silent
from service.store.resolve import is_quantized
from service.store.sink import behind_sink
from service.store.tokenizer import text_tokenizer

SHOWN = 4
"""Kinds of tokens that a warning names."""

logger = logging.getLogger(__name__)


def quantize_model(
    source: Path,
    out: Path,
    scheme: Scheme,
    calibration: Calibration,
    device: torch.device,
    *,
    on_progress: Progress = silent,
    windows: Tensor | None = None,
) -> None:
    """Write the int8 checkpoint of a float model folder. After an interruption, a second call resumes.

    Args:
        windows: the result of `calibration_windows`, if known already.

    Raises:
        UnsupportedModel: the source is quantized already, not of a served family, or has values that are not finite.
        FileExistsError: out exists and is not empty.
    """
    # Fails before minutes of calibration rather than after.
    refuse_occupied(out)
    calibration = calibration.for_scheme(scheme)
    if is_quantized(source):
        raise UnsupportedModel(f"{source} is quantized already; start from the float model")
    config = ModelConfig.load(source)
    if not scheme.needs_calibration:
        # Names and shapes are checked, as `calibration_windows` does.
        load_decoder(source, None, torch.device("meta"))
    elif windows is None:
        windows = calibration_windows(source, calibration, device, on_progress)
    try:
        quantize_checkpoint(
            source,
            out,
            Recipe(
                scheme=scheme,
                linear_names=tuple(linear_names(config)),
                down_names=down_names(config),
                qkv_names=tuple(qkv_names(config)),
                stream=stream_of(config) if scheme.is_rotated else None,
                groups=tuple(smooth_groups(config)),
                dtype=config.dtype,
                windows=None if windows is None else behind_sink(windows, scheme.sink),
                device=device,
                seed=calibration.seed,
            ),
            notes={"calibration": calibration.describe(source) if scheme.needs_calibration else None},
            on_progress=lambda done, total, detail: on_progress("quantizing layers", done, total, detail),
        )
    except (InvalidScheme, Unquantizable) as error:
        raise UnsupportedModel(f"{source} cannot be quantized: {error}") from error
    if scheme.shares_activation_scales:
        _tell_massive_tokens(source, out, scheme)


def _tell_massive_tokens(source: Path, out: Path, scheme: Scheme) -> None:
    """Warn of tokens that spoil scales that all share, and that no sink keeps out."""
    found = noted_tokens(read_json(out / NOTES_NAME))
    if not found:
        return
    worst = max(found, key=lambda token: token.ratio)
    logger.warning(
        "%s have activations up to %.0f times as large as other tokens', most in layer %d, from position %d on, and "
        "may widen scales that tokens share: compare with a scheme that has a scale for each, as w8a8%s",
        _shown(source, [token.token_id for token in found]),
        worst.ratio,
        worst.layer,
        min(token.first for token in found),
        "" if scheme.sink else ", or look at --sink, which keeps the first token of a text in float",
    )


def _shown(source: Path, token_ids: list[int]) -> str:
    """Tokens as a user knows them, the first few."""
    try:
        tokenizer = text_tokenizer(source)
        names = [repr(tokenizer.decode([token_id], skip_special_tokens=False)) for token_id in token_ids[:SHOWN]]
    except UnsupportedModel:
        names = [str(token_id) for token_id in token_ids[:SHOWN]]
    others = f" and {len(token_ids) - SHOWN} others" if len(token_ids) > SHOWN else ""
    return f"the tokens {', '.join(names)}{others}"


def quantized_folder(
    source: Path,
    scheme: Scheme,
    calibration: Calibration,
    cache: Path,
    device: torch.device,
    *,
    on_progress: Progress = silent,
) -> Path:
    """The cached int8 checkpoint of a float model, created on the first call for these weights and settings.

    The storage type of keys and values changes no tensor, so one folder, marked "float", serves both. A folder with a
    damaged file is created again, because a flipped bit in a weight would not be noticed anywhere else.
    """
    scheme, calibration = scheme.with_kv("float").with_head("float"), calibration.for_scheme(scheme)
    key = _fingerprint(source, scheme, calibration)
    out = cache / "quantized" / f"{source.resolve().name}-{scheme.name}-{key}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if out.is_dir() and (name := first_damaged(out)) is not None:
            logger.warning("%s is not what was written; quantizing %s again", out / name, source)
            shutil.rmtree(out)
        if not out.is_dir():
            quantize_model(source, out, scheme, calibration, device, on_progress=on_progress)
    return out


def _fingerprint(source: Path, scheme: Scheme, calibration: Calibration) -> str:
    """A hash of the weights' files, the scheme, the calibration and ottava's version."""
    digest = hashlib.sha256(repr((__version__, scheme, calibration)).encode())
    if calibration.text is not None and calibration.text.is_file():
        digest.update(calibration.text.read_bytes())
    for path in sorted(source.resolve().glob("*")):
        if path.suffix in (".safetensors", ".json"):
            status = path.stat()
            digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:12]
