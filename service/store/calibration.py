"""The tokens that schemes are calibrated on and that quality is measured on."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant.convert.calibration import self_written, windows_from_text
from quant.convert.decoder_layers import unpadded_config
from quant.errors import NotFinite, TextTooShort
from quant.scheme import Scheme
from service.errors import InvalidSettings, UnsupportedModel, first_line
from service.models.config import ModelConfig
from service.models.devices import pick_dtype
from service.models.loader import load_decoder
from service.store.progress import Progress, silent
from service.store.tokenizer import text_tokenizer
from service.store.tokenizer_file import library_faults, unusable

DEFAULT_WINDOWS = 8
"""Windows of 512 tokens: smoothing needs typical inputs."""

STATIC_WINDOWS = 32
"""Windows for static scales, which need the rare large inputs too."""

SELF_WRITTEN_TOKENS = 128
"""Longest window that the model writes itself: many short ones are more varied and need fewer steps."""


SELF_WRITTEN_MAX_BYTES = 2 * 2**30
"""Largest float weights of a model that writes its own calibration text, for which it must fit in memory as a whole."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The tokens that a scheme is calibrated on.

    text: a UTF-8 file; if None, a model of up to SELF_WRITTEN_MAX_BYTES writes its own text, and a larger one uses the
        standard library's help topics.
    seed: for self-written text, and for the choice of tokens that smoothing and ranges are evaluated on.
    num_windows, window_len: number of windows, None for as many as a scheme needs, and tokens of each.
    offset: windows to skip at the start of a text, if another use reads those.
    """

    text: Path | None = None
    seed: int = 0
    num_windows: int | None = None
    window_len: int = 512
    offset: int = 0

    def for_scheme(self, scheme: Scheme) -> Calibration:
        """The same with the number of windows that the scheme needs, where none was chosen."""
        needed = STATIC_WINDOWS if scheme.activation == "static" else DEFAULT_WINDOWS
        return self if self.num_windows is not None else replace(self, num_windows=needed)

    def is_self_written(self, folder: Path) -> bool:
        """Whether the model of a folder writes the text itself."""
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return self.text is None and num_bytes <= SELF_WRITTEN_MAX_BYTES

    def describe(self, folder: Path) -> str:
        """A phrase for the text that the model in folder is calibrated on."""
        source = "Python's help topics" if self.text is None else self.text.name
        if self.is_self_written(folder):
            source = f"text that the model wrote itself, seed {self.seed}"
        if self.num_windows is None:
            default, static = (count * self.window_len for count in (DEFAULT_WINDOWS, STATIC_WINDOWS))
            return f"{default} tokens, {static} for static scales, of {source}"
        return f"{self.num_windows * self.window_len} tokens of {source}"


def calibration_text(path: Path | None) -> str:
    """The content of a UTF-8 file, or the standard library's help topics (0.47 MB of English) for None.

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
    """Windows of a text (see `calibration_text`) in a model's tokens, [num_windows, window_len] int64.

    Raises:
        InvalidSettings: the text cannot be read or is too short.
        UnsupportedModel: the folder has no usable tokenizer.
    """
    text, tokenizer = calibration_text(path), text_tokenizer(folder)
    with library_faults(partial(unusable, folder)):
        try:
            windows = windows_from_text(tokenizer, text, num_windows=num_windows, window_len=window_len, offset=offset)
        except TextTooShort as error:
            raise InvalidSettings(f"text {path or 'of the standard library'}: {error}") from error
    refuse_beyond(folder, int(windows.max()))
    return windows


def refuse_beyond(folder: Path, token_id: int) -> None:
    """Raise UnsupportedModel if the model of a folder has no row for a token of a text."""
    num_rows = ModelConfig.load(folder).vocab_size
    if token_id >= num_rows:
        raise UnsupportedModel(
            f"{folder}: the tokenizer makes token {token_id} of the text, but the model's token ids run from 0 to "
            f"{num_rows - 1}; leave that token out of the text, or use the model's own tokenizer"
        )


def calibration_windows(
    folder: Path, calibration: Calibration, device: torch.device, on_progress: Progress = silent
) -> Tensor:
    """The tokens that a model is calibrated on, [n, L] int64; see `Calibration.for_scheme`.

    Raises:
        InvalidSettings: the calibration text cannot be read or is too short.
        CheckpointError: a tensor is missing, corrupt or of another shape.
        UnsupportedModel: the model cannot write text, because its logits are not finite.
    """
    config = ModelConfig.load(folder)
    num_windows = calibration.num_windows or DEFAULT_WINDOWS
    # transformers fills a missing tensor with random values, so names and shapes are checked first.
    load_decoder(folder, None, torch.device("meta"))
    if not calibration.is_self_written(folder):
        window_len = min(calibration.window_len, config.max_model_len)
        return text_windows(folder, calibration.text, num_windows, window_len, calibration.offset)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=unpadded_config(folder),
        dtype=pick_dtype("auto", config, device),
        device_map=str(device),
        trust_remote_code=False,
        use_safetensors=True,
    )
    window_len = min(calibration.window_len, SELF_WRITTEN_TOKENS, config.max_model_len)
    try:
        return self_written(
            model,
            num_windows=num_windows * calibration.window_len // window_len,
            window_len=window_len,
            seed=calibration.seed,
            on_progress=lambda done, total: on_progress("writing calibration text", done, total),
        )
    except NotFinite as error:
        raise UnsupportedModel(f"{folder} cannot be calibrated: {error}") from error
