"""From what the user named to a folder that can be served: fetched if need be, quantized once, kept in the cache."""

from __future__ import annotations

import hashlib
import logging
import pydoc_data.topics
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels import __version__
from quant.calibrate import self_written, windows_from_text
from quant.convert import quantize_checkpoint, refuse_occupied
from quant.scheme import Scheme
from quant.sums import first_damaged
from quant.tensors import read_json
from service.errors import InvalidSettings, ModelNotFound, UnsupportedModel, first_line
from service.models.config import ModelConfig, linear_names, smooth_groups
from service.models.demo import prepare_demo_model
from service.models.devices import pick_dtype
from service.models.loader import load_decoder, refuse_unsafe

FETCHED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
"""What is downloaded of a model: never pickled weights, never code."""

SELF_WRITTEN_TOKENS = 128
"""Longest window that the model writes itself: many short ones differ more, and are written in fewer steps."""

SELF_WRITTEN_MAX_BYTES = 2 * 2**30
"""Largest float weights of a model that writes its own calibration text: to write, it must be in memory as a whole."""


logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Told how far a stage is; total is 0 where its length is not known."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "", /) -> None:
        """detail: what came of the last part, and the seconds left, where a stage says so."""


def silent(_stage: str, _done: int, _total: int, _detail: str = "", /) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The tokens that a scheme is fitted to.

    text: a UTF-8 file; None lets a model of up to SELF_WRITTEN_MAX_BYTES write its own text (seed), and gives a larger
        one the standard library's help topics.
    seed: of self-written text, and of the choice of tokens that smoothing and ranges are judged by.
    num_windows, window_len: how much of it is read, in windows of so many tokens.
    offset: windows skipped at the start of a text, where another use reads those.
    """

    text: Path | None = None
    seed: int = 0
    num_windows: int = 8
    window_len: int = 512
    offset: int = 0

    def is_self_written(self, folder: Path) -> bool:
        """Whether the model of a folder writes the text itself."""
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return self.text is None and num_bytes <= SELF_WRITTEN_MAX_BYTES

    def describe(self, folder: Path) -> str:
        """What a model of that folder is calibrated on, in words."""
        source = "Python's help topics" if self.text is None else self.text.name
        if self.is_self_written(folder):
            source = f"text that the model wrote itself, seed {self.seed}"
        return f"{self.num_windows * self.window_len} tokens of {source}"


def resolve_model(name: str | None, cache: Path, on_stage: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of a model: the demo model where none is named, a local folder, or a Hugging Face id, fetched.

    Raises:
        ModelNotFound: neither a folder nor an id that can be fetched.
        UnsafeCheckpoint: its weights are pickled.
    """
    if name is None:
        return prepare_demo_model(cache, on_stage)
    folder = Path(name)
    if not folder.is_dir():
        folder = _fetch(name, on_stage)
    refuse_unsafe(folder)
    return folder


def _fetch(name: str, on_stage: Callable[[str], None]) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_file():
        raise ModelNotFound(f"{name} is not a folder; name a model folder or a Hugging Face id such as owner/model")
    on_stage(f"fetching {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=FETCHED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"{name} is neither a folder nor a model that can be fetched ({first_line(error)})"
        ) from error


def is_quantized(folder: Path) -> bool:
    """Whether a model folder names a quantization in its config.json.

    Raises:
        CheckpointError: config.json is not a JSON object.
    """
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("quantization_config") is not None


def calibration_text(path: Path | None) -> str:
    """A UTF-8 text file, or the standard library's help topics (0.47 MB of English) where none is named.

    Raises:
        InvalidSettings: the file cannot be read.
    """
    if path is None:
        return "\n\n".join(pydoc_data.topics.topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"the text {path} cannot be read: {first_line(error)}") from error


def text_windows(folder: Path, path: Path | None, num_windows: int, window_len: int, offset: int = 0) -> Tensor:
    """Windows of a text (see `calibration_text`) by a model's tokenizer, [num_windows, window_len] int64.

    Raises:
        InvalidSettings: the text cannot be read or is too short.
        UnsupportedModel: the folder has no usable tokenizer.
    """
    text = calibration_text(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"{folder}: no usable tokenizer: {first_line(error)}") from error
    try:
        return windows_from_text(tokenizer, text, num_windows, window_len, offset)
    except ValueError as error:
        raise InvalidSettings(f"text {path or 'of the standard library'}: {error}") from error


def calibration_windows(
    folder: Path, calibration: Calibration, device: torch.device, on_progress: Progress = silent
) -> Tensor:
    """The tokens that a model is calibrated on, [n, L] int64.

    Raises:
        InvalidSettings: the calibration text cannot be read or is too short.
        CheckpointError: a tensor is missing, corrupt or of another shape.
        UnsupportedModel: the model cannot write, as its logits are not finite.
    """
    config = ModelConfig.load(folder)
    # transformers gives a missing tensor random values, so names and shapes are checked before it is asked.
    load_decoder(folder, None, torch.device("meta"))
    if not calibration.is_self_written(folder):
        window_len = min(calibration.window_len, config.max_model_len)
        return text_windows(folder, calibration.text, calibration.num_windows, window_len, calibration.offset)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=pick_dtype("auto", config, device), device_map=str(device), trust_remote_code=False
    )
    window_len = min(calibration.window_len, SELF_WRITTEN_TOKENS, config.max_model_len)
    try:
        return self_written(
            model,
            calibration.num_windows * calibration.window_len // window_len,
            window_len,
            calibration.seed,
            lambda done, total: on_progress("writing calibration text", done, total),
        )
    except ValueError as error:
        raise UnsupportedModel(f"{folder} cannot be calibrated: {error}") from error


def quantize_model(
    source: Path,
    out: Path,
    scheme: Scheme,
    calibration: Calibration,
    device: torch.device,
    on_progress: Progress = silent,
    windows: Tensor | None = None,
) -> None:
    """Write the int8 checkpoint of a float model folder. Interrupted and called again, it goes on where it stopped.

    Args:
        windows: what `calibration_windows` gave, where it is known already.

    Raises:
        UnsupportedModel: the source is quantized already, not of a served family, or holds values that are not finite.
        FileExistsError: out exists and is not empty.
    """
    # Known before minutes of calibration, not after them.
    refuse_occupied(out)
    if is_quantized(source):
        raise UnsupportedModel(f"{source} is quantized already; start from the float model")
    config = ModelConfig.load(source)
    if windows is None and scheme.needs_calibration:
        windows = calibration_windows(source, calibration, device, on_progress)
    try:
        quantize_checkpoint(
            source,
            out,
            scheme,
            smooth_groups(config),
            linear_names(config),
            config.dtype,
            {"calibration": calibration.describe(source) if scheme.needs_calibration else None},
            windows,
            device,
            calibration.seed,
            lambda done, total, detail: on_progress("quantizing layers", done, total, detail),
        )
    except ValueError as error:
        raise UnsupportedModel(f"{source} cannot be quantized: {error}") from error


def quantized_folder(
    source: Path,
    scheme: Scheme,
    calibration: Calibration,
    cache: Path,
    device: torch.device,
    on_progress: Progress = silent,
) -> Path:
    """The int8 checkpoint of a float model in the cache, made on the first call for these weights and settings.

    What keys and values are stored in changes none of its tensors: one folder serves both, and says "float". A folder
    with a file that is not what was written is made anew: a flipped bit of a weight shows nowhere else.
    """
    scheme = scheme.with_kv("float")
    key = _fingerprint(source, scheme, calibration)
    out = cache / "quantized" / f"{source.resolve().name}-{scheme.name}-{key}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if out.is_dir() and (name := first_damaged(out)) is not None:
            logger.warning("%s is not what was written; %s is quantized anew", out / name, source)
            shutil.rmtree(out)
        if not out.is_dir():
            quantize_model(source, out, scheme, calibration, device, on_progress)
    return out


def _fingerprint(source: Path, scheme: Scheme, calibration: Calibration) -> str:
    """Changes with the weights' files, the scheme, the calibration and the version that quantized."""
    digest = hashlib.sha256(repr((__version__, scheme, calibration)).encode())
    if calibration.text is not None and calibration.text.is_file():
        digest.update(calibration.text.read_bytes())
    for path in sorted(source.resolve().glob("*")):
        if path.suffix in (".safetensors", ".json"):
            status = path.stat()
            digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:12]
