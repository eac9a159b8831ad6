"""Quantizes one decoder layer: smoothing, distillation, rounding, and the error against the float layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quant.convert.decoder_layers import LayerStream
from quant.convert.distill import Student, distill
from quant.convert.gptq import round_gptq
from quant.convert.inputs import Inputs, gather
from quant.convert.int8 import Int8Module, Int8Tensors
from quant.convert.massive import massive_tokens
from quant.convert.rotate import Stream
from quant.convert.rounding import ScaleRule, dequantize
from quant.convert.search import FULL_RANGES, Ranges, best_ranges, readers_of_one, round_nearest, smooth_layer
from quant.convert.smoothquant import SmoothGroup
from quant.errors import Unquantizable
from quant.scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """What to quantize of a model, how, and by what.

    scheme: an int8 scheme; a group size that does not divide every width is halved until it does.
    linear_names: the Linears to quantize; every other matrix stays float, as lm_head does.
    down_names: those of them that are the last Linear of an MLP.
    groups: what to smooth, if the scheme smooths.
    dtype: float16, bfloat16 or float32; of norms, embeddings, biases and stored scales.
    windows: [n, L] int64 token ids to calibrate on, which begin with the scheme's sink; None where the scheme needs no
        calibration.
    device: where layers are computed.
    seed: of the choice of tokens that smoothing and ranges are judged by.
    stream: the modules around the residual stream, if the scheme rotates.
    qkv_names: of each layer, the Linears of queries, keys and values, in the order of `Sink.qkv`; for a sink alone.
    """

    scheme: Scheme
    linear_names: tuple[str, ...]
    groups: tuple[SmoothGroup, ...]
    dtype: torch.dtype
    down_names: frozenset[str] = frozenset()
    windows: Tensor | None = None
    device: torch.device | str = "cpu"
    seed: int = 0
    qkv_names: tuple[tuple[str, ...], ...] = ()
    stream: Stream | None = None

    def scheme_of(self, name: str) -> Scheme:
        """What the Linear of that name is quantized by."""
        return self.scheme.of_down() if name in self.down_names else self.scheme


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A finished layer: its tensors by checkpoint name, the choices made, the float layer's outputs, and the sink's row
    of `Sink.qkv` if there is one."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]
    hidden: list[Tensor]
    sink: Tensor | None


class LayerQuantizer:
    """One layer, loaded in float32.

    Args:
        stream: the model.
        index: which of its layers.
        recipe: what to do.
    """

    def __init__(self, stream: LayerStream, index: int, recipe: Recipe) -> None:
        self.stream = stream
        self.index = index
        self.recipe = recipe
        self.prefix = stream.prefixes[index]
        self.layer = stream.load(index)
        modules = ((f"{self.prefix}.{name}", module) for name, module in self.layer.named_modules())
        wanted = set(recipe.linear_names)
        self.linears = {name: module for name, module in modules if name in wanted}
        self.transposed = {name for name, module in self.linears.items() if isinstance(module, Conv1D)}
        named = ((f"{self.prefix}.{name}", parameter.data) for name, parameter in self.layer.named_parameters())
        # Weights are [N, K] here; only files and modules of some families have them transposed.
        self.state = {name: tensor.T if self._is_transposed(name) else tensor for name, tensor in named}
        self.notes: dict[str, Any] = {}

    @torch.no_grad()
    def quantize(self, windows: Sequence[Tensor]) -> QuantizedLayer:
        """Do all steps of the scheme.

        Args:
            windows: hidden states [1, L, hidden] that enter the layer; none if the scheme needs no calibration and has
                no sink.

        Raises:
            Unquantizable: a weight or an activation is not finite, or a Linear whose range is needed never ran.
        """
        scheme, hidden, inputs = self.recipe.scheme, list[Tensor](), dict[str, Inputs]()
        if windows and scheme.needs_calibration:
            hidden, inputs = self._measure(windows)
            self.notes["massive_tokens"] = self._massive_tokens(hidden)
        elif windows:
            hidden = [self._run(window) for window in windows]
        if scheme.smoothing is not None:
            self._smooth(inputs)
        sink = self._sink(windows[0]) if scheme.sink else None
        if scheme.is_distilled:
            self._distill(windows, hidden)
        ranges = self._ranges(inputs)
        int8 = {name: self._rounded(name, inputs.get(name), ranges.get(name, FULL_RANGES)) for name in self.linears}
        self.notes["error"] = self._error(int8, windows, hidden)
        return QuantizedLayer(self._stored(int8), self.notes, hidden, sink)

    def _measure(self, windows: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Inputs]]:
        """The float layer's outputs, and the inputs of its Linears."""
        has_gram = self.recipe.scheme.rounding == "gptq"
        num_sinks = len(self.recipe.scheme.sink)
        hidden, inputs = gather(
            self.linears, self._run, windows, has_gram=has_gram, seed=self.recipe.seed, num_skipped=num_sinks
        )
        for name, read in inputs.items():
            if not bool(read.channels.absmax.isfinite().all()):
                raise Unquantizable(f"the input of {name} is NaN or infinite over the calibration windows")
        return hidden, inputs

    def _massive_tokens(self, hidden: Sequence[Tensor]) -> list[dict[str, Any]]:
        windows = self.recipe.windows
        assert windows is not None
        found = massive_tokens(hidden, windows, len(self.recipe.scheme.sink), self.index)
        return [token._asdict() for token in found]

    def _smooth(self, inputs: dict[str, Inputs]) -> None:
        groups = [group for group in self.recipe.groups if self._is_within(group.source)]
        choices = smooth_layer(self.state, groups, inputs, scheme_of=self.recipe.scheme_of, dtype=self.recipe.dtype)
        self.notes["alphas"] = {source: choice.note for source, choice in choices.items()}
        splits = {source: choice.split.moved for source, choice in choices.items() if choice.split is not None}
        if splits:
            self.notes["splits"] = splits
        self._put_back()

    def _sink(self, window: Tensor) -> Tensor:
        """What the smoothed float Linears of queries, keys and values give for the sink: [S, (H + 2G) D]."""
        found: dict[str, Tensor] = {}

        def keep(name: str, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            found[name] = output[0, : len(self.recipe.scheme.sink)].clone()

        names = self.recipe.qkv_names[self.index]
        handles = [self.linears[name].register_forward_hook(partial(keep, name)) for name in names]
        try:
            self._run(window)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([found[name] for name in names], dim=1).cpu()

    def _put_back(self) -> None:
        """Load `state` into the module."""
        values = {
            name.removeprefix(f"{self.prefix}."): tensor.T if self._is_transposed(name) else tensor
            for name, tensor in self.state.items()
        }
        self.layer.load_state_dict(values, strict=False, assign=True)

    def _distill(self, windows: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        students = {}
        for name in self.linears:
            weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
            students[name] = Student(weight, bias, scheme=self.recipe.scheme, scale_dtype=self.recipe.dtype)
            self._replace(name, students[name])
        num_sinks = len(self.recipe.scheme.sink)
        losses = distill(
            list(students.values()),
            lambda hidden: self._run(hidden)[:, num_sinks:],
            windows,
            [target[:, num_sinks:] for target in targets],
        )
        self.notes["distillation"] = dict(zip(("before", "after"), losses, strict=True))
        for name, student in students.items():
            self.state[f"{name}.weight"] = student.weight.data

    def _ranges(self, inputs: dict[str, Inputs]) -> dict[str, Ranges]:
        """The ranges of each Linear that was reached; readers of one activation share its range."""
        found = dict[str, Ranges]()
        if self.recipe.scheme.weight != "tensor" and self.recipe.scheme.activation != "static":
            return found
        for names in readers_of_one(inputs):
            scheme = self.recipe.scheme_of(names[0])
            weights = {name: self.state[f"{name}.weight"] for name in names}
            try:
                found |= best_ranges(weights, {name: inputs[name] for name in names}, scheme, self.recipe.dtype)
            except Unquantizable as error:
                raise Unquantizable(f"{', '.join(names)}: a weight cannot be quantized: {error}") from error
        clipped = {name: ranges for name, ranges in found.items() if ranges != FULL_RANGES}
        if clipped:
            self.notes["ranges"] = clipped
        return found

    def _rounded(self, name: str, inputs: Inputs | None, ranges: Ranges) -> Int8Tensors:
        scheme, dtype, weight = self.recipe.scheme_of(name), self.recipe.dtype, self.state[f"{name}.weight"]
        try:
            if inputs is None:
                if scheme.activation == "static":
                    raise Unquantizable(
                        "no calibration token reached it, so it has no static range; give a longer text"
                    )
                return round_nearest(weight, None, scheme, dtype)
            nearest = round_nearest(weight, inputs.channels.absmax, scheme, dtype, ranges)
            if inputs.gram is None:
                return nearest
            codes, scale = round_gptq(weight, inputs.gram, ScaleRule.of(scheme, dtype, ranges.weight))
            return Int8Tensors(codes, scale, nearest.input_scale)
        except Unquantizable as error:
            raise Unquantizable(f"{name}.weight cannot be quantized: {error}") from error

    def _error(self, int8: dict[str, Int8Tensors], windows: Sequence[Tensor], hidden: Sequence[Tensor]) -> float:
        """The relative error of the int8 layer's output on the first window, the mean over tokens but the sink's.

        Without windows it is the mean relative error of the weights.
        """
        num_sinks = len(self.recipe.scheme.sink)
        if not windows or windows[0].shape[1] == num_sinks:
            off = [
                float((dequantize(t.codes, t.scale) - weight).norm() / weight.norm().clamp_min(1e-30))
                for t, weight in ((tensors, self.state[f"{name}.weight"]) for name, tensors in int8.items())
            ]
            return sum(off) / max(1, len(off))
        for name, tensors in int8.items():
            linear = tensors.linear(self.recipe.scheme_of(name), self.state.get(f"{name}.bias"))
            self._replace(name, Int8Module(linear))
        exact = hidden[0][:, num_sinks:]
        off_by = (self._run(windows[0])[:, num_sinks:] - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
        return float(off_by.mean())

    def _stored(self, int8: dict[str, Int8Tensors]) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, tensor in self.state.items():
            module, _, kind = name.rpartition(".")
            if module in int8 and kind == "weight":
                stored |= int8[module].stored(module, module in self.transposed)
            else:
                stored[name] = tensor
        return {name: tensor.cpu() for name, tensor in stored.items()}

    def _run(self, hidden: Tensor) -> Tensor:
        return self.stream.run(self.index, self.layer, hidden)

    def _replace(self, name: str, module: nn.Module) -> None:
        self.layer.set_submodule(name.removeprefix(f"{self.prefix}."), module)

    def _is_within(self, name: str) -> bool:
        return name.startswith(f"{self.prefix}.")

    def _is_transposed(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.transposed
