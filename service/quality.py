"""`ottava evaluate`: every scheme quantized, loaded and run as it would be served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from quant.evaluate import Quality, evaluate
from quant.scheme import Scheme
from service.errors import UnsupportedModel
from service.models.decoder import Decoder, score
from service.models.families import ModelConfig
from service.models.loader import load_decoder, pick_device, pick_dtype
from service.models.prepare import Calibration, Progress, is_quantized, measure_ranges, quantize_model, silent
from service.settings import Settings


def measure_quality(
    folder: Path,
    schemes: Sequence[Scheme],
    windows: Tensor,
    calibration: Calibration,
    settings: Settings,
    on_progress: Progress = silent,
) -> list[Quality]:
    """One row a scheme, the float baseline first.

    Args:
        folder: a float model.
        schemes: what to compare; the baseline is measured whether it is among them or not.
        windows: [n, L] int64 token ids to measure on.
        calibration: where activation ranges come from; measured once for all schemes.

    Raises:
        UnsupportedModel: the model is quantized already, not of a served family, shorter of context than a window, or
            its logits are not finite.
    """
    if is_quantized(folder):
        raise UnsupportedModel(f"{folder} is quantized already; evaluate the float model and name schemes")
    device = pick_device(settings.device)
    length = windows.shape[1]
    dtype = pick_dtype(settings.dtype, ModelConfig.load(folder, length), device)
    quantized = [scheme for scheme in schemes if scheme.is_int8]
    ranges: dict[str, Tensor] = {}
    if any(scheme.needs_calibration for scheme in quantized):
        ranges = measure_ranges(folder, calibration, device, on_progress)
    candidates: dict[str, Callable[[Tensor], Tensor]] = {}
    with TemporaryDirectory(prefix="ottava-evaluate-") as scratch:
        for scheme in quantized:
            out = Path(scratch) / scheme.name
            quantize_model(folder, out, scheme, calibration, device, on_progress, ranges)
            candidates[scheme.label] = _scorer(load_decoder(out, dtype, device, length))
        baseline = _scorer(load_decoder(folder, dtype, device, length))
        try:
            return evaluate(
                ("fp16", baseline), candidates, windows, lambda done, total: on_progress("measuring", done, total)
            )
        except ValueError as error:
            raise UnsupportedModel(f"{folder} cannot be measured: {error}") from error


def _scorer(decoder: Decoder) -> Callable[[Tensor], Tensor]:
    def logits_of(token_ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return score(decoder, token_ids)

    return logits_of
