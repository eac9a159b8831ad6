"""The error of each Linear of a scheme: its int8 product compared with the float product of the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quant.checkpoint.reader import Checkpoint
from quant.checkpoint.safetensors_files import TensorFiles
from quant.convert.decoder_layers import LayerStream
from quant.convert.rounding import dequantize
from quant.convert.smoothquant import SmoothGroup, copied
from quant.convert.split import Split
from quant.linear import FloatLinear, Int8Linear


@dataclass(frozen=True, slots=True)
class LinearError:
    """||y_int8 - y_float|| / ||y_float|| of one Linear, the mean over the tokens that it read."""

    name: str
    error: float


@dataclass(slots=True)
class _Smoothing:
    """How Linears were smoothed, by name.

    columns: what they were multiplied by, [K].   rows: what they were divided by, [N].
    read, written: which channel of the float model each column reads and each row writes, [K] and [N], for those whose
    channels were split.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class _Sums:
    """Running float64 sum over tokens."""

    error: float = 0.0
    num_tokens: int = 0


@torch.no_grad()
def linear_errors(
    source: Path,
    quantized: Checkpoint,
    groups: Sequence[SmoothGroup],
    windows: Tensor,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    open_files: Callable[[Path], TensorFiles] = TensorFiles,
) -> list[LinearError]:
    """The error of each Linear, the largest first.

    error = mean_t ||s_out * int8(x_t / s_in) - (W x_t + b)|| / ||W x_t + b||

    The error is relative per token, since a few tokens (the first of a text) have activations a thousand times as large
    as the others'. x is what the Linear reads in the float model, so no error comes from another Linear; int8 is the
    product that is served, with the checkpoint's weights, scales and rounding of the input. Smoothing is undone around
    it: s_in and s_out are 1 if the scheme does not smooth. A norm's s is exact. A Linear's is the ratio of its rows
    before and after, which the rounding of its weights changes by about 0.5 % / sqrt(K).

    One float layer is in memory at a time, and the hidden states of all windows.

    Args:
        source: folder of the float model.
        quantized: the int8 checkpoint made of it, opened in float32 on the device to compute on.
        groups: what the scheme smooths; empty if it does not.
        windows: [n, L] int64 token ids; if the checkpoint has a sink, they begin with it, and its tokens do not count.
        on_progress: called after each layer with (done, total).
        open_files: opens the float folder's tensors, rotated if the checkpoint was.

    Raises:
        CheckpointError: a tensor is missing from either folder or has another shape.
    """
    stream = LayerStream(source, torch.float32, quantized.device, open_files)
    hidden = stream.embed(windows)
    sums: dict[str, _Sums] = {}
    for index, prefix in enumerate(stream.prefixes):
        layer = stream.load(index)
        modules = {f"{prefix}.{name}": module for name, module in layer.named_modules()}
        linears = {name: module for name, module in modules.items() if _is_int8(quantized, name, module)}
        int8 = {name: _load(quantized, name, module) for name, module in linears.items()}
        inside = [group for group in groups if group.source.startswith(f"{prefix}.")]
        smoothing = _smoothing(inside, open_files(source), quantized, linears, int8)
        sums |= {name: _Sums() for name in linears}
        with _watched(linears, int8, smoothing, sums, num_skipped=len(quantized.sink_ids)):
            hidden = [stream.run(index, layer, window) for window in hidden]
        stream.drop(index)
        if on_progress is not None:
            on_progress(index + 1, len(stream.prefixes))
    # A Linear that read no token (of an expert) has no error.
    seen = [LinearError(name, s.error / s.num_tokens) for name, s in sums.items() if s.num_tokens]
    return sorted(seen, key=lambda row: -row.error)


def _is_int8(quantized: Checkpoint, name: str, module: nn.Module) -> bool:
    stored = quantized.quantization
    return isinstance(module, nn.Linear | Conv1D) and stored is not None and stored.format_of(name) is not None


def _load(quantized: Checkpoint, name: str, module: nn.Module) -> FloatLinear | Int8Linear:
    out_features, in_features = _weight(module).shape
    is_transposed = isinstance(module, Conv1D)
    return quantized.linear(name, out_features, in_features, module.bias is not None, is_transposed=is_transposed)


def _weight(module: nn.Module) -> Tensor:
    """The weight as [N, K]; Conv1D stores [K, N]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def _smoothing(
    groups: Sequence[SmoothGroup],
    floats: TensorFiles,
    quantized: Checkpoint,
    linears: Mapping[str, nn.Module],
    int8: Mapping[str, FloatLinear | Int8Linear],
) -> _Smoothing:
    """How the groups of one layer were smoothed, in the order in which they were folded."""
    found = _Smoothing()
    for group in groups:
        if group.source in linears:
            before = _weight(linears[group.source]) * found.columns.get(group.source, 1.0)
            moved = quantized.notes.get("splits", {}).get(group.source)
            if moved is not None and group.gate is not None:
                origins = Split.read(moved, len(before)).origins.to(before.device)
                before = before[origins]
                found.written |= {group.source: origins, group.gate: origins}
                found.read |= dict.fromkeys(group.sinks, origins)
            s = _ratio(before, _stored_weight(int8[group.source]))
            found.rows[group.source] = s
        else:
            name = f"{group.source}.weight"
            before, after = (files.get(name).float() + group.offset for files in (floats, quantized.files))
            s = _ratio(before[:, None], after[:, None]).to(quantized.device)
        for sink in group.sinks:
            found.columns[sink] = copied(s, group)
    return found


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    """s [N] with before_n ~ s_n after_n, row by row; 1 for a row of zeros.

    By projection, in which rounding errors cancel. By length if the rows hardly resemble each other: their fault then
    shows in their own output and not in what reads it.
    """
    common, lengths = (before * after).sum(1).abs(), before.norm(dim=1)
    is_alike = common > 0.5 * lengths * after.norm(dim=1)
    s = torch.where(is_alike, lengths.square() / common, lengths / after.norm(dim=1))
    return torch.where(s.isfinite() & (s > 0), s, 1.0)


def _stored_weight(linear: FloatLinear | Int8Linear) -> Tensor:
    """The weight that the codes represent, [N, K]."""
    if isinstance(linear, FloatLinear):
        return linear.weight
    scale = linear.weight_scale if linear.weight_scale.numel() == 1 else linear.weight_scale.view(linear.shape[0], -1)
    return dequantize(linear.weight_q, scale)


@contextmanager
def _watched(
    linears: Mapping[str, nn.Module],
    int8: Mapping[str, FloatLinear | Int8Linear],
    smoothing: _Smoothing,
    sums: Mapping[str, _Sums],
    num_skipped: int,
) -> Iterator[None]:
    """While the context lasts, every call of a Linear adds to its sums, all tokens of its window but the first ones."""

    def watch(name: str, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # What experts read is no window, and models with experts have no sink.
        x, y = ((t[:, num_skipped:] if num_skipped else t).flatten(0, -2) for t in (args[0], output))
        if name in smoothing.read:
            x = x[:, smoothing.read[name]]
        if name in smoothing.written:
            y = y[:, smoothing.written[name]]
        found = int8[name](x / smoothing.columns.get(name, 1.0)) * smoothing.rows.get(name, 1.0)
        norms = y.double().norm(dim=1)
        # A row of zeros has no relative error.
        ratios = ((found - y).double().norm(dim=1) / norms)[norms > 0]
        sums[name].error += ratios.sum().item()
        sums[name].num_tokens += len(ratios)

    handles = [module.register_forward_hook(partial(watch, name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
