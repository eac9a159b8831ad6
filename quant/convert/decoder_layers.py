"""Runs any decoder of transformers with the float weights of one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quant.checkpoint.model_config import read_config
from quant.checkpoint.safetensors_files import TensorFiles
from quant.convert.experts import separate_experts
from quant.errors import Unquantizable


class _LayersPassed(Exception):
    """Ends a forward pass after the last layer: what follows is not needed and has no weights."""


@dataclass(slots=True)
class _Call:
    """The arguments of a layer beside the hidden states: masks, positions, angles."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Replaces a layer: keeps its arguments and returns the hidden states unchanged."""

    def __init__(self, layer: nn.Module, is_last: bool) -> None:
        super().__init__()
        self.attributes = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
        self.is_last = is_last
        self.hidden = torch.empty(0)
        self.call = _Call((), {})

    def __getattr__(self, name: str) -> Any:
        # Some models read a layer's attributes before they call it.
        attributes = self.__dict__.get("attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            self.hidden, self.call = args[0], _Call(args[1:], kwargs)
        else:
            self.hidden = kwargs.pop("hidden_states")
            self.call = _Call((), kwargs)
        if self.is_last:
            raise _LayersPassed
        return self.hidden


class LayerStream:
    """The layers of a float checkpoint, loaded and run one after the other.

    The model is built without values. Beside the hidden states, only the embeddings (the rows in use) and one layer at
    a time are in memory.

    Args:
        folder: config.json and safetensors, sharded or not.
        dtype: of the layers' computation.
        device: of the layers' computation.
        open_files: opens the folder's tensors, perhaps changed ones.

    Attributes:
        prefixes: module name of each layer, in order.

    Raises:
        Unquantizable: the model has no list of decoder layers.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        open_files: Callable[[Path], TensorFiles] = TensorFiles,
    ) -> None:
        self.folder = folder
        self._open_files = open_files
        self.dtype = dtype
        self.device = device
        self.model = skeleton(folder)
        self._layers_name, layers = _find_layers(self.model)
        self._layers = list(layers)
        self._calls: list[_Call] = []
        self.prefixes = [f"{self._layers_name}.{index}" for index in range(len(self._layers))]

    @torch.no_grad()
    def embed(self, windows: Tensor) -> list[Tensor]:
        """Hidden states [1, L, hidden] that enter the first layer, one per window of windows [n, L] int64.

        It also keeps the other arguments of each layer, which are the same for all windows.
        """
        recorders = [_Recorder(layer, layer is self._layers[-1]) for layer in self._layers]
        base, name = self.model.base_model, self._layers_name
        parent = self.model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], nn.ModuleList(recorders))
        ids = self._load_embeddings(windows)
        hidden = []
        for window in ids.to(self.device):
            try:
                base(input_ids=window[None], use_cache=False)
            except _LayersPassed:
                hidden.append(recorders[0].hidden)
        self._calls = [recorder.call for recorder in recorders]
        return hidden

    def _load_embeddings(self, windows: Tensor) -> Tensor:
        """Load all weights outside the layers, of the token embedding only rows in use; windows renumbered."""
        files = self._open_files(self.folder)
        used, renumbered = torch.unique(windows, return_inverse=True)
        token_embedding = self.model.get_input_embeddings()
        for module_name, module in self.model.base_model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                full = ".".join(part for part in (self.model.base_model_prefix, module_name, name) if part)
                if parameter.is_meta and full in files:
                    tensor = files.get(full)
                    values = tensor[used] if module is token_embedding else tensor
                    setattr(module, name, self._parameter(values))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.device))
        ids: Tensor = renumbered.view_as(windows)
        return ids

    def load(self, index: int) -> nn.Module:
        """The layer of that number, with its values, in `dtype` on `device`.

        Raises:
            CheckpointError: a tensor of it is missing.
        """
        # Opened for each layer: an open file keeps every page that was read from it in memory.
        files = self._open_files(self.folder)
        layer, prefix = self._layers[index], self.prefixes[index]
        state = {name: self._parameter(files.get(f"{prefix}.{name}")) for name, _ in layer.named_parameters()}
        layer.load_state_dict(state, strict=False, assign=True)
        return layer.to(self.device).eval()

    def drop(self, index: int) -> None:
        """Free a layer and its values."""
        self._layers[index] = nn.Identity()

    def widths(self, names: Iterable[str]) -> list[int]:
        """K of Linears by module name."""
        modules = {
            f"{self._layers_name}.{name}": module for name, module in nn.ModuleList(self._layers).named_modules()
        }
        return [_width(modules[name]) for name in names]

    def run(self, index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Apply a layer to hidden states [1, L, hidden], with the arguments that the model gives layer `index`."""
        call = self._calls[index]
        y = layer(hidden, *call.args, **call.kwargs)
        output: Tensor = y[0] if isinstance(y, tuple) else y
        return output

    def _parameter(self, tensor: Tensor) -> nn.Parameter:
        # A copy: the tensor is in the file's memory-mapped pages, which should be freed.
        return nn.Parameter(tensor.to(self.device, self.dtype, copy=True), requires_grad=False)


def unpadded_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder for a model that is never given padding.

    transformers refuses a padding id beyond the embedding's rows, which many fine-tunes have, and torch one beyond the
    rows that are loaded; in a forward pass the id changes nothing.
    """
    config = read_config(folder)
    config.pad_token_id = None
    return config


def skeleton(folder: Path) -> PreTrainedModel:
    """The model of a folder's config.json: parameters without values, buffers with theirs.

    Stacked experts are separated, so that modules have the names that checkpoints give their tensors.
    """
    config = unpadded_config(folder)
    with _valueless_parameters():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        separate_experts(model)
    model.train(mode=False)
    return model


def has_own_head(model: PreTrainedModel, files: TensorFiles) -> bool:
    """Whether a checkpoint has a head that differs from its embedding.

    Args:
        model: of the checkpoint, with or without values.
    """
    names = {module: name for name, module in model.named_modules()}
    head, embedding = (
        f"{names.get(module)}.weight"
        for module in (model.get_output_embeddings(), model.get_input_embeddings())  # type: ignore[no-untyped-call]
    )
    return head in files and not (embedding in files and files.is_equal(head, embedding))


def _width(linear: nn.Module) -> int:
    # Conv1D, GPT-2's Linear, stores its weight [K, N].
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0 if isinstance(linear, Conv1D) else 1]


@contextmanager
def _valueless_parameters() -> Iterator[None]:
    """Within the context parameters are on the meta device; buffers, which no checkpoint stores, are computed."""

    def drop_values(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(drop_values)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    num_layers = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name, module
    raise Unquantizable(f"{type(model).__name__} has no list of {num_layers} decoder layers")
