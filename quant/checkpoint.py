"""A model folder opened for serving: float tensors and Linears by name, int8 or float as its config.json says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.compressed import LinearFormat, Quantization, parse
from quant.linear import FloatLinear, Int8Linear
from quant.scheme import PRESETS, KVStorage, Scheme
from quant.tensors import CheckpointError, TensorFiles, cast, read_json

__all__ = ["NOTES_NAME", "Checkpoint", "CheckpointError"]

NOTES_NAME = "ottava.json"
"""Our own notes beside config.json: scheme, alpha, KV cache, calibration. Readers of compressed-tensors allow no extra
keys, and those that serve refuse a kv_cache_scheme of int8: with one in config.json vLLM would not load the folder."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One folder: config.json, safetensors, and perhaps our notes.

    config: config.json.
    quantization: what its quantization_config says; None for a float model.
    notes: ottava.json; empty where the folder is not ours.
    dtype, device: what tensors are cast and moved to.
    """

    folder: Path
    config: dict[str, Any]
    quantization: Quantization | None
    notes: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    files: TensorFiles

    @classmethod
    def open(cls, folder: Path, dtype: torch.dtype, device: torch.device | str) -> Checkpoint:
        """Open a folder, float or int8.

        Args:
            folder: config.json and safetensors, sharded or one file.
            dtype: float16, bfloat16 or float32, of all float tensors and of the Linears' outputs.
            device: where tensors go.

        Raises:
            CheckpointError: not a model folder, pickled weights, a corrupt or missing file, or a quantization that is
                not served.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
        config = read_json(folder / "config.json")
        quantization = parse(config)
        notes_path = folder / NOTES_NAME
        notes = read_json(notes_path) if notes_path.is_file() else {}
        return cls(folder, config, quantization, notes, dtype, torch.device(device), TensorFiles(folder))

    @property
    def scheme_name(self) -> str | None:
        """The preset this folder was written with; None where the notes do not say."""
        name = self.notes.get("scheme")
        return name if isinstance(name, str) else None

    @property
    def scheme(self) -> Scheme | None:
        """The scheme this folder was written with; None where the notes name no preset.

        Raises:
            CheckpointError: the notes have a value that no scheme takes.
        """
        if self.scheme_name not in PRESETS:
            return None
        try:
            return replace(PRESETS[self.scheme_name], smoothing=self.notes.get("alpha"), kv=self.kv)
        except ValueError as error:
            raise CheckpointError(f"{self.folder / NOTES_NAME}: {error}") from error

    @property
    def kv(self) -> KVStorage:
        """What keys and values are stored in unless the user says otherwise; "float" where the notes do not say.

        Raises:
            CheckpointError: the notes ask for a storage that is not served.
        """
        kv = self.notes.get("kv", "float")
        if kv == "float":
            return "float"
        if kv == "int8":
            return "int8"
        raise CheckpointError(f'{self.folder / NOTES_NAME}: kv = {kv!r} is not served; write "float" or "int8"')

    def __contains__(self, name: str) -> bool:
        """Whether the folder has a tensor of that name."""
        return name in self.files

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A float tensor, in `dtype` on `device`.

        Raises:
            CheckpointError: it is missing, has another shape, is stored as integers, or does not fit `dtype`.
        """
        stored = self._stored(name, shape)
        if not stored.is_floating_point():
            raise CheckpointError(
                f"{self.files.path(name)}: {name} is stored as {_dtype_name(stored)}, expected float; "
                "config.json does not list it as quantized"
            )
        return cast(stored, self.dtype, name).to(self.device)

    def linear(self, name: str, out_features: int, in_features: int, has_bias: bool) -> FloatLinear | Int8Linear:
        """The Linear of that module name, weight [out_features, in_features]: int8 if targeted and not ignored.

        Every tensor stored under the name is used or refused: no scale is left unread. Zero points of a symmetric
        scheme, which older tools store, must be all zero. Codes of -128, written by tools whose scale is
        absmax / 127.5, are kept as they are.

        Raises:
            CheckpointError: a tensor is missing, has another shape or dtype, a scale is not positive and finite, or
                a tensor is left over.
        """
        linear_format = None if self.quantization is None else self.quantization.format_of(name)
        bias = self.tensor(f"{name}.bias", (out_features,)) if has_bias else None
        used = {f"{name}.weight"} | ({f"{name}.bias"} if has_bias else set())
        if linear_format is None:
            weight = self.tensor(f"{name}.weight", (out_features, in_features))
            self._refuse_leftovers(name, used)
            return FloatLinear(weight, bias)
        codes = self._codes(f"{name}.weight", (out_features, in_features))
        num_scales = out_features if linear_format.weight == "channel" else 1
        weight_scale = self._scale(f"{name}.weight_scale", num_scales)
        is_static = linear_format.activation == "static"
        input_scale = self._scale(f"{name}.input_scale", 1) if is_static else None
        used |= {f"{name}.weight_scale"} | ({f"{name}.input_scale"} if is_static else set())
        used |= self._zero_points(name, linear_format)
        self._refuse_leftovers(name, used)
        return Int8Linear(codes, weight_scale, bias, linear_format.activation, input_scale, self.dtype)

    def _stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.files.get(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.files.path(name)}: {name} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        return tensor

    def _codes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        codes = self._stored(name, shape)
        if codes.dtype != torch.int8:
            raise CheckpointError(
                f"{self.files.path(name)}: {name} is stored as {_dtype_name(codes)}, expected int8: config.json lists "
                "it as quantized; add it to `ignore`, or quantize the float model again"
            )
        return codes.to(self.device)

    def _scale(self, name: str, num_scales: int) -> Tensor:
        """A scale as float32 [num_scales]; stored as [n], [n, 1], or [] for one."""
        stored = self.files.get(name)
        if stored.numel() != num_scales or any(size not in (1, num_scales) for size in stored.shape):
            expected = [num_scales, 1] if num_scales > 1 else [1]
            raise CheckpointError(
                f"{self.files.path(name)}: {name} has shape {list(stored.shape)}, expected {expected}"
            )
        if not stored.is_floating_point():
            raise CheckpointError(f"{self.files.path(name)}: {name} is {_dtype_name(stored)}, expected float")
        scale = stored.float().reshape(num_scales)
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise CheckpointError(f"{self.files.path(name)}: {name} holds a scale that is not positive and finite")
        return scale.to(self.device)

    def _zero_points(self, name: str, linear_format: LinearFormat) -> set[str]:
        """Names of the stored zero points that are all zero, as a symmetric scheme's are."""
        suffixes = ["weight_zero_point"] + (["input_zero_point"] if linear_format.activation == "static" else [])
        stored = [f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" in self.files]
        for zero_point in stored:
            if bool(self.files.get(zero_point).any()):
                raise CheckpointError(
                    f"{self.files.path(zero_point)}: {zero_point} is not zero though config.json says symmetric; "
                    "quantize the float model again"
                )
        return set(stored)

    def _refuse_leftovers(self, name: str, used: set[str]) -> None:
        left = [key for key in self.files.names if key.startswith(f"{name}.") and key not in used]
        if left:
            raise CheckpointError(
                f"{self.files.path(left[0])}: {', '.join(left)} would be loaded and never used: config.json and the "
                "weights do not belong together, or the model's family reads no such tensor"
            )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
