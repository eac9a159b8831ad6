"""A model folder opened for serving: float tensors, and Linears by name, int8 or float according to config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint.compressed_tensors import parse
from quant.checkpoint.json_file import read_json
from quant.checkpoint.notes import NOTES_NAME, schemes_of
from quant.checkpoint.safetensors_files import TensorFiles, cast, largest
from quant.checkpoint.sink import Sink
from quant.checkpoint.targets import LinearFormat, Quantization
from quant.errors import CheckpointError, InvalidScheme
from quant.linear import FloatLinear, InputCodes, Int8Linear
from quant.part import WHOLE, Part, taken
from quant.scheme import KVStorage, Scheme

BUFFERS = re.compile(
    r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$"  # angles, which follow from config.json
    r"|\.(attn|attention)\.(bias|masked_bias)$"  # the causal mask of GPT-2 and GPT-NeoX
    r"|^model\.decoder\.version$"  # of OPT's first code
)
"""Names of tensors that older code saved beside the weights: constants."""

NUM_NAMED = 3
"""Most tensors that a message names."""
MAX_NAME_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One folder: config.json, safetensors, and perhaps our notes.

    config: config.json.
    quantization: its quantization_config; None for a float model.
    notes: ottava.json; empty if there is none.
    schemes: one for each way in which Linears are stored; empty for a float model. Scales are as config.json says. What
        config.json cannot express (smoothing, rounding) is from the notes, so a folder written by another tool is named
        after its scales, "int8 channel/token", and not after a method.
    dtype, device: of the tensors that are returned.
    """

    folder: Path
    config: dict[str, Any]
    quantization: Quantization | None
    notes: dict[str, Any]
    schemes: tuple[Scheme, ...]
    dtype: torch.dtype
    device: torch.device
    files: TensorFiles

    @classmethod
    def open(cls, folder: Path, dtype: torch.dtype, device: torch.device | str) -> Checkpoint:
        """Open a folder, float or int8.

        Args:
            folder: config.json and safetensors, sharded or one file.
            dtype: float16, bfloat16 or float32, of all float tensors and of the Linears' outputs.
            device: of all tensors.

        Raises:
            CheckpointError: not a model folder, pickled weights, a corrupt or missing file, a quantization that is
                not served, or notes with a value that no scheme takes.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
        config = read_json(folder / "config.json")
        try:
            quantization = parse(config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        notes_path = folder / NOTES_NAME
        notes = read_json(notes_path) if notes_path.is_file() else {}
        try:
            schemes = schemes_of(quantization, notes)
        except InvalidScheme as error:
            raise CheckpointError(f"{notes_path}: {error}; quantize the float model again") from error
        return cls(
            folder=folder,
            config=config,
            quantization=quantization,
            notes=notes,
            schemes=schemes,
            dtype=dtype,
            device=torch.device(device),
            files=TensorFiles(folder),
        )

    @property
    def scheme_name(self) -> str | None:
        """The names of its schemes; None for a float model."""
        return " + ".join(dict.fromkeys(scheme.name for scheme in self.schemes)) or None

    @property
    def sink_ids(self) -> tuple[int, ...]:
        """The tokens that every text begins with; none if it was not quantized with such ones."""
        return self.schemes[0].sink if self.schemes else ()

    def sink(self) -> Sink | None:
        """What those tokens are in the float model.

        Raises:
            CheckpointError: their file is missing or damaged.
        """
        ids = self.sink_ids
        return Sink.load(self.folder, ids, self.dtype, self.device) if ids else None

    @property
    def kv(self) -> KVStorage:
        """The default storage of keys and values; "float" if the notes do not say."""
        return self.schemes[0].kv if self.schemes else "float"

    @property
    def outliers(self) -> float | None:
        """The threshold above which an input column is multiplied in float; None for none."""
        return self.schemes[0].outliers if self.schemes else None

    def tensor(self, name: str, shape: tuple[int, ...], part: Part = WHOLE) -> Tensor:
        """A float tensor, in `dtype` on `device`.

        Args:
            shape: of the whole.
            part: which of it is read.

        Raises:
            CheckpointError: it is missing, has another shape, is stored as integers, does not fit `dtype`, or is not
                finite. The self-check would not find all of these: a row of an embedding is one token's alone.
        """
        stored = self._stored(name, shape, part)
        if not stored.is_floating_point():
            raise CheckpointError(
                f"{self.files.path(name)}: {name} is stored as {_dtype_name(stored)}, expected float; "
                "config.json does not list it as quantized"
            )
        read = cast(stored, self.dtype, name)
        tensor = read.to(self.device)
        if not math.isfinite(largest(read if tensor.is_meta else tensor)):
            raise CheckpointError(
                f"{self.files.path(name)}: {name} holds NaN or infinite values; download or convert the model again"
            )
        return tensor

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        has_bias: bool,
        *,
        is_transposed: bool = False,
        part: Part = WHOLE,
    ) -> FloatLinear | Int8Linear:
        """The Linear of that module name, weight [out_features, in_features]: int8 if targeted and not ignored.

        Every tensor stored under the name is used or refused, so that no scale is missed. Zero points of a symmetric
        scheme, which older tools store, must be all zero. Codes of -128, from tools whose scale is absmax / 127.5, are
        kept.

        Args:
            is_transposed: the weight, codes too, is stored [in_features, out_features], as GPT-2's is.
            part: which of it is read; out_features and in_features are of the whole.

        Raises:
            CheckpointError: a tensor is missing, has another shape or dtype, a scale is not positive and finite,
                groups do not divide in_features or the part, or a tensor is left over.
        """
        linear_format = None if self.quantization is None else self.quantization.format_of(name)
        shape = out_features, in_features
        bias = self.tensor(f"{name}.bias", (out_features,), Part(part.rows)) if has_bias else None
        bias = bias if part.adds else None
        used = {f"{name}.weight"} | ({f"{name}.bias"} if has_bias else set())
        if linear_format is None:
            weight = _matrix(self.tensor, f"{name}.weight", shape, is_transposed, part)
            self._refuse_leftovers(name, used)
            return FloatLinear(weight, bias)
        codes = _matrix(self._codes, f"{name}.weight", shape, is_transposed, part)
        weight_scale = self._scale(f"{name}.weight_scale", self._scale_shape(name, shape, linear_format))
        weight_scale = self._part_of_scale(name, weight_scale, shape, part)
        is_static = linear_format.activation == "static"
        input_scale = self._scale(f"{name}.input_scale", (1,)) if is_static else None
        used |= {f"{name}.weight_scale"} | ({f"{name}.input_scale"} if is_static else set())
        zero_point = self._zero_point(f"{name}.input_zero_point") if linear_format.has_zero_point else None
        used |= {f"{name}.input_zero_point"} if linear_format.has_zero_point else set()
        used |= self._idle_zero_points(name, linear_format)
        self._refuse_leftovers(name, used)
        outliers = self.outliers if linear_format.activation == "token" else None
        input_codes = InputCodes(linear_format.activation, input_scale, zero_point, outliers)
        return Int8Linear(codes, weight_scale, input_codes=input_codes, out_dtype=self.dtype, bias=bias)

    def differs(self, name: str, other: str) -> bool:
        """Whether a tensor of that name is stored, and is not equal to the other one."""
        if name not in self.files:
            return False
        is_equal = other in self.files and self.files.is_equal(name, other)
        if is_equal:
            self.files.copies.add(name)
        return not is_equal

    def refuse_unused(self) -> list[str]:
        """Names of tensors that nothing has read and that change nothing: copies, and buffers that older code saved.

        Raises:
            CheckpointError: another tensor has not been read, so the model is not the one that was saved.
        """
        unused = [name for name in self.files.names if name not in self.files.taken]
        left = [name for name in unused if not BUFFERS.search(name) and name not in self.files.copies]
        if left:
            raise CheckpointError(
                f"{self.files.path(left[0])}: {some_of(left)} would never be used: config.json and "
                "the weights do not belong together, or the model's family reads no such tensor; mend config.json, or "
                "remove the tensors if the model does without them"
            )
        return unused

    def _stored(self, name: str, shape: tuple[int, ...], part: Part) -> Tensor:
        stored = self.files.shape(name)
        if stored != shape:
            raise CheckpointError(f"{self.files.path(name)}: {name} has shape {list(stored)}, expected {list(shape)}")
        return self.files.get(name, part.rows, part.columns)

    def _codes(self, name: str, shape: tuple[int, ...], part: Part) -> Tensor:
        codes = self._stored(name, shape, part)
        if codes.dtype != torch.int8:
            raise CheckpointError(
                f"{self.files.path(name)}: {name} is stored as {_dtype_name(codes)}, expected int8: config.json lists "
                "it as quantized; add it to `ignore`, or quantize the float model again"
            )
        return codes.to(self.device)

    def _scale_shape(self, name: str, shape: tuple[int, int], linear_format: LinearFormat) -> tuple[int, ...]:
        """[1] per tensor, [out, 1] per channel, [out, groups] per group."""
        out_features, in_features = shape
        if linear_format.weight == "tensor":
            return (1,)
        size = linear_format.group_size or in_features
        if in_features % size:
            raise CheckpointError(
                f"{self.files.folder}: {name} has {in_features} inputs, which groups of {size} do not divide; quantize "
                "the float model again with a smaller group_size"
            )
        return out_features, in_features // size

    def _scale(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A scale as float32 [n], or [n, groups] for several groups; dimensions of 1 need not be stored."""
        stored = self.files.get(name)
        if [size for size in stored.shape if size > 1] != [size for size in shape if size > 1] or not stored.numel():
            raise CheckpointError(
                f"{self.files.path(name)}: {name} has shape {list(stored.shape)}, expected {list(shape)}"
            )
        if not stored.is_floating_point():
            raise CheckpointError(f"{self.files.path(name)}: {name} is {_dtype_name(stored)}, expected float")
        has_groups = len(shape) == 2 and shape[1] > 1
        scale = stored.float().reshape(shape if has_groups else shape[:1])
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise CheckpointError(f"{self.files.path(name)}: {name} holds a scale that is not positive and finite")
        return scale.to(self.device)

    def _part_of_scale(self, name: str, scale: Tensor, shape: tuple[int, int], part: Part) -> Tensor:
        """The scales of a part: [1] of a matrix as it is, [N] of rows, [N, groups] of rows and groups of columns."""
        if part.columns is not None and scale.ndim == 2:
            size = shape[1] // scale.shape[1]
            (columns,) = part.columns
            if columns.start % size or columns.stop % size:
                raise CheckpointError(
                    f"{self.files.folder}: {name} has scales for groups of {size} inputs, and a rank's part of its "
                    f"{shape[1]} inputs is not a whole number of groups; serve it with fewer ranks"
                )
            scale = scale[:, columns.start // size : columns.stop // size].contiguous()
        return taken(scale, Part(part.rows)) if len(scale) == shape[0] else scale

    def _zero_point(self, name: str) -> Tensor:
        """The code of 0 of an asymmetric activation, int8 [1]."""
        stored = self.files.get(name)
        if stored.dtype != torch.int8 or stored.numel() != 1:
            raise CheckpointError(
                f"{self.files.path(name)}: {name} is {_dtype_name(stored)} {list(stored.shape)}, expected int8 [1]"
            )
        return stored.reshape(1).to(self.device)

    def _idle_zero_points(self, name: str, linear_format: LinearFormat) -> set[str]:
        """Names of the zero points that are stored for symmetric tensors; they must be all zero."""
        is_symmetric = linear_format.activation == "static" and not linear_format.has_zero_point
        suffixes = ["weight_zero_point"] + (["input_zero_point"] if is_symmetric else [])
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
                f"{self.files.path(left[0])}: {some_of(left)} would be loaded and never used: config.json and the "
                "weights do not belong together, or the model's family reads no such tensor"
            )


def _matrix(
    read: Callable[[str, tuple[int, ...], Part], Tensor],
    name: str,
    shape: tuple[int, int],
    is_transposed: bool,
    part: Part,
) -> Tensor:
    """A part of a weight of that shape, stored so or transposed."""
    return read(name, shape[::-1], part.transposed()).t().contiguous() if is_transposed else read(name, shape, part)


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(map(_shown, names[:NUM_NAMED])) + more


def _shown(name: str) -> str:
    """A tensor's name; a file may hold one that no line can show."""
    return name if name.isprintable() and len(name) <= MAX_NAME_CHARS else f"{name[:MAX_NAME_CHARS]!r}"


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
