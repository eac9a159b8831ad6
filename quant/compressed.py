"""The `quantization_config` of compressed-tensors: which Linears are int8 and how. What is not served is refused.

Accepted: formats int-quantized and naive-quantized, for the whole or per group; int8 weights, symmetric, per tensor or
per channel; int8 input activations, symmetric, per token, dynamic per tensor or static per tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quant.linear import Activation
from quant.scheme import Scheme
from quant.tensors import CheckpointError

_FORMATS = ("int-quantized", "naive-quantized")
_REMEDY = "quantize the float model with `ottava quantize`, or take a checkpoint in int-quantized W8A8"
# Classes of a Linear in PyTorch, which is what a class-name target is compared with.
_LINEAR_CLASSES = ("Linear", "Module")


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """How one group of Linears is stored: scale per "tensor" or "channel" of the weight, and the activation's kind."""

    weight: Literal["tensor", "channel"]
    activation: Activation


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a checkpoint says of itself: targets (name, `re:` pattern or class) -> format, and what to leave out."""

    targets: Mapping[str, LinearFormat]
    ignore: tuple[str, ...]

    def format_of(self, name: str) -> LinearFormat | None:
        """How the Linear of that module name is stored; None for float.

        The most specific target decides: the exact name, then a pattern (in alphabetical order, as compressed-tensors
        has it), then a class.
        """
        if any(_matches(name, entry) for entry in self.ignore):
            return None
        is_pattern = sorted(target for target in self.targets if target.startswith("re:"))
        for target in (name, *is_pattern, *_LINEAR_CLASSES):
            if target in self.targets and _matches(name, target):
                return self.targets[target]
        return None


def parse(config: Mapping[str, Any]) -> Quantization | None:
    """The quantization of a model's config.json; None where it is a float model.

    Raises:
        CheckpointError: it is quantized in a way that is not served; the message says what was found and the remedy.
    """
    if "compression_config" in config:
        raise _refused("the key compression_config, of compressed-tensors before its version 0.5")
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise _refused(f"quantization_config = {quantization!r}")
    _check_top_level(quantization)
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refused("a quantization_config without config_groups")
    targets: dict[str, LinearFormat] = {}
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise _refused(f"config_groups.{name} = {group!r}, a preset's name instead of its values")
        linear_format = _parse_group(f"config_groups.{name}", group, quantization.get("format"))
        targets |= dict.fromkeys(_strings(f"config_groups.{name}.targets", group.get("targets")), linear_format)
    if "Embedding" in targets:
        raise _refused("an int8 embedding (target Embedding)")
    return Quantization(targets, tuple(_strings("ignore", quantization.get("ignore") or [])))


def render(scheme: Scheme, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` that describes a scheme's checkpoint, every key of it known to compressed-tensors.

    It says nothing of the KV cache: a kv_cache_scheme means calibrated float8 scales to those that serve it.

    Args:
        scheme: an int8 scheme.
        ignore: names of the Linears that stay float.
    """
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": scheme.weight, "dynamic": False}
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token" if scheme.activation == "token" else "tensor",
        "dynamic": scheme.activation != "static",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations},
        },
    }


def _check_top_level(quantization: dict[str, Any]) -> None:
    method = quantization.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        raise _refused(f"quant_method {method!r}")
    sparsity = quantization.get("sparsity_config") or {}
    # "dense" only reports the share of zeros that the tool measured; nothing is packed.
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise _refused(f"sparse weights (sparsity_config {sparsity!r})")
    transform = quantization.get("transform_config") or {}
    if transform and not (isinstance(transform, dict) and not any(transform.values())):
        raise _refused("a non-empty transform_config (rotations applied while the model runs)")
    if quantization.get("kv_cache_scheme") is not None:
        raise _refused("a calibrated kv_cache_scheme")


def _parse_group(where: str, group: dict[str, Any], default_format: object) -> LinearFormat:
    found = group.get("format") or default_format or "int-quantized"
    if found not in _FORMATS:
        raise _refused(f"format {found!r} in {where}")
    if group.get("output_activations") is not None:
        raise _refused(f"{where}.output_activations (int8 outputs)")
    weights = _int8_args(f"{where}.weights", group.get("weights"))
    inputs = _int8_args(f"{where}.input_activations", group.get("input_activations"))
    if not weights.get("symmetric", True):
        raise _refused(f"asymmetric weights ({where}.weights.symmetric is false)")
    if weights.get("dynamic", False):
        raise _refused(f"weights quantized while the model runs ({where}.weights.dynamic)")
    if weights.get("actorder") in (True, "group", "dynamic"):
        raise _refused(f"reordered weight columns ({where}.weights.actorder = {weights['actorder']!r})")
    return LinearFormat(_weight_scale(where, weights), _activation(where, inputs))


def _int8_args(where: str, args: object) -> dict[str, Any]:
    if args is None:
        raise _refused(f"{where} = null (int8 on one side of the product only)")
    if not isinstance(args, dict):
        raise _refused(f"{where} = {args!r}")
    num_bits, kind = args.get("num_bits", 8), args.get("type", "int")
    if num_bits != 8 or isinstance(num_bits, bool):
        raise _refused(f"{where}.num_bits = {num_bits!r}")
    if kind != "int":
        raise _refused(f"{where}.type = {kind!r}")
    return args


def _weight_scale(where: str, weights: dict[str, Any]) -> Literal["tensor", "channel"]:
    strategy = _strategy(weights)
    if strategy == "tensor":
        return "tensor"
    if strategy == "channel":
        return "channel"
    raise _refused(f"{where}.weights.strategy = {strategy!r} (one scale per {strategy})")


def _activation(where: str, inputs: dict[str, Any]) -> Activation:
    strategy, dynamic = _strategy(inputs), inputs.get("dynamic", False)
    if not inputs.get("symmetric", True):
        kind = "per-token" if strategy == "token" else "static" if not dynamic else "per-tensor"
        raise _refused(f"asymmetric {kind} activations with an input_zero_point ({where}.input_activations)")
    if strategy == "token" and dynamic is True:
        return "token"
    if strategy == "tensor" and isinstance(dynamic, bool):
        return "tensor" if dynamic else "static"
    raise _refused(f"{where}.input_activations with strategy {strategy!r} and dynamic = {dynamic!r}")


def _strategy(args: dict[str, Any]) -> str:
    """The strategy, by compressed-tensors' rule where it is missing: group_size none -> tensor, -1 -> channel."""
    strategy, group_size = args.get("strategy"), args.get("group_size")
    if strategy is not None:
        return str(strategy).lower()
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"


def _strings(where: str, value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise _refused(f"{where} = {value!r} (expected a list of names)")
    for entry in value:
        _check_pattern(where, entry)
    return value


def _check_pattern(where: str, entry: str) -> None:
    if not entry.startswith("re:"):
        return
    try:
        re.compile(entry.removeprefix("re:"))
    except re.error as error:
        raise _refused(f"{where} holds the pattern {entry!r}, which does not compile ({error})") from error


def _matches(name: str, entry: str) -> bool:
    """Whether a Linear's module name meets one target or ignore entry."""
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), name) is not None
    return entry == name or entry in _LINEAR_CLASSES


def _refused(what: str) -> CheckpointError:
    return CheckpointError(f"config.json asks for {what}, which is not served; {_REMEDY}")
