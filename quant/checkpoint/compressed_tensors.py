"""The `quantization_config` of compressed-tensors: which Linears are int8 and how. Anything not served is refused.

Accepted: formats int-quantized and naive-quantized, of the whole model or per group; int8 weights, symmetric, per
tensor, per channel or per group of inputs; int8 input activations, symmetric, per token, dynamic per tensor or static
per tensor, the last also asymmetric.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from quant.checkpoint.targets import LinearFormat, Quantization
from quant.errors import CheckpointError
from quant.linear import InputKind
from quant.scheme import MIN_GROUP_SIZE, Scheme

_FORMATS = ("int-quantized", "naive-quantized")
_REMEDY = "quantize the float model with `ottava quantize`, or take a checkpoint in int-quantized W8A8"
_METHODS = {
    "awq": "packed 4-bit weights with float activations",
    "bitsandbytes": "weights that bitsandbytes unpacks as it runs",
    "fp8": "float8 weights and activations",
    "gptq": "packed weights with float activations",
}
# Presets whose name may stand in place of a group's values, and that are served.
_W8A8 = ("W8A8", "INT8")
_W8A8_VALUES = {"weights": {"strategy": "channel"}, "input_activations": {"strategy": "token", "dynamic": True}}

# Every key that is read here or does not affect how a Linear is computed. Any other key might change results.
_TOP_KEYS = frozenset(
    (
        "config_groups",
        "dequantize",
        "format",
        "global_compression_ratio",
        "ignore",
        "kv_cache_scheme",
        "moe_sparsity_config",
        "quant_method",
        "quantization_status",
        "run_compressed",
        "sparsity_config",
        "transform_config",
        "use_optimized_inference",
        "version",
    )
)
_GROUP_KEYS = frozenset(("format", "input_activations", "output_activations", "targets", "weights"))
_ARGS_KEYS = frozenset(
    (
        "actorder",
        "block_structure",
        "dynamic",
        "group_size",
        "num_bits",
        "observer",
        "observer_kwargs",
        "scale_dtype",
        "strategy",
        "symmetric",
        "type",
        "zp_dtype",
    )
)


def parse(config: Mapping[str, Any]) -> Quantization | None:
    """The quantization of a model's config.json; None for a float model.

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
        where = f"config_groups.{name}"
        values = _values(where, name, group)
        linear_format = _parse_group(where, values, quantization.get("format"))
        targets |= dict.fromkeys(_strings(f"{where}.targets", values.get("targets")), linear_format)
    if "Embedding" in targets:
        raise _refused("an int8 embedding (target Embedding)")
    ignore = quantization.get("ignore")
    return Quantization(targets, () if ignore is None else tuple(_strings("ignore", ignore)))


def render(scheme: Scheme, ignore: list[str], down_names: Iterable[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of a scheme's checkpoint, with keys that compressed-tensors knows.

    It does not describe the KV cache: servers take a kv_cache_scheme for calibrated float8 scales.

    Args:
        scheme: an int8 scheme.
        ignore: names of the Linears that stay float.
        down_names: of the last Linears of MLPs, which a scheme may treat as a group of their own.
    """
    groups = [(["Linear"], scheme)]
    if scheme.has_token_down and (patterns := _patterns(down_names)):
        groups.append((patterns, scheme.of_down()))
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {f"group_{i}": _group(targets, each) for i, (targets, each) in enumerate(groups)},
    }


def _patterns(names: Iterable[str]) -> list[str]:
    """Patterns of these names, one for all layers and experts: their numbers are left open."""
    return sorted({"re:" + re.sub(r"(?<=\.)\d+(?=\\)", r"\\d+", re.escape(name)) + "$" for name in names})


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": scheme.weight, "dynamic": False}
    if scheme.weight == "group":
        weights["group_size"] = scheme.group_size
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token" if scheme.activation == "token" else "tensor",
        "dynamic": scheme.activation != "static",
    }
    return {"targets": targets, "weights": weights, "input_activations": activations}


def _check_top_level(quantization: dict[str, Any]) -> None:
    method = quantization.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        known = _METHODS.get(method) if isinstance(method, str) else None
        raise _refused(f"quant_method {method!r}{f' ({known})' if known else ''}")
    _refuse_unknown("quantization_config", quantization, _TOP_KEYS)
    sparsity = quantization.get("sparsity_config") or {}
    # "dense" only reports the share of zeros; nothing is packed.
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise _refused(f"sparse weights (sparsity_config {sparsity!r})")
    if quantization.get("moe_sparsity_config") is not None:
        raise _refused("experts left out by layer (moe_sparsity_config)")
    transform = quantization.get("transform_config") or {}
    if transform and not (isinstance(transform, dict) and not any(transform.values())):
        raise _refused("a non-empty transform_config (rotations applied while the model runs)")
    if quantization.get("kv_cache_scheme") is not None:
        raise _refused("a calibrated kv_cache_scheme (int8 keys and values here need none: --kv-cache int8)")


def _values(where: str, name: str, group: object) -> dict[str, Any]:
    """A group's values; a group may also be a preset's name with a list of targets."""
    if isinstance(group, list) and name.upper() in _W8A8:
        return {"targets": group, **_W8A8_VALUES}
    if not isinstance(group, dict):
        raise _refused(f"{where} = {group!r}, a preset other than {' and '.join(_W8A8)}")
    _refuse_unknown(where, group, _GROUP_KEYS)
    return group


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
    weight, group_size = _weight_scale(f"{where}.weights", weights)
    activation = _activation(f"{where}.input_activations", inputs)
    return LinearFormat(weight, activation, group_size, has_zero_point=not inputs.get("symmetric", True))


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
    if not isinstance(args.get("symmetric", True), bool):
        raise _refused(f"{where}.symmetric = {args['symmetric']!r}")
    _refuse_unknown(where, args, _ARGS_KEYS)
    return args


def _weight_scale(where: str, weights: dict[str, Any]) -> tuple[Literal["tensor", "channel", "group"], int | None]:
    """The granularity of the scales, and the group size if they are per group."""
    strategy, size = _strategy(weights), weights.get("group_size")
    if strategy == "group":
        if not isinstance(size, int) or isinstance(size, bool) or size < MIN_GROUP_SIZE or size & (size - 1):
            raise _refused(f"{where}.group_size = {size!r} (not a power of two from {MIN_GROUP_SIZE})")
        return "group", size
    if size not in (None, -1):
        raise _refused(f"{where}.group_size = {size!r} with strategy {strategy!r}")
    if strategy == "tensor":
        return "tensor", None
    if strategy == "channel":
        return "channel", None
    raise _refused(f"{where}.strategy = {strategy!r} (one scale per {strategy})")


def _activation(where: str, inputs: dict[str, Any]) -> InputKind:
    strategy, dynamic = _strategy(inputs), inputs.get("dynamic", False)
    if not inputs.get("symmetric", True) and (strategy, dynamic) != ("tensor", False):
        raise _refused(f"asymmetric per-{strategy} activations with a zero point found as the model runs ({where})")
    if inputs.get("scale_dtype") is not None:
        raise _refused(f"{where}.scale_dtype = {inputs['scale_dtype']!r} (scales rounded to another type)")
    if strategy == "token" and dynamic is True:
        return "token"
    if strategy == "tensor" and isinstance(dynamic, bool):
        return "tensor" if dynamic else "static"
    raise _refused(f"{where} with strategy {strategy!r} and dynamic = {dynamic!r}")


def _strategy(args: dict[str, Any]) -> str:
    """The strategy; if it is missing, by compressed-tensors' rule: group_size None -> tensor, -1 -> channel."""
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
    except (re.error, OverflowError, RecursionError) as error:
        raise _refused(f"{where} holds the pattern {entry!r}, which does not compile ({error})") from error


def _refuse_unknown(where: str, content: dict[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(str(key) for key in content.keys() - known)
    if unknown:
        raise _refused(f"the unknown key {unknown[0]} in {where}")


def _refused(what: str) -> CheckpointError:
    return CheckpointError(f"config.json asks for {what}, which is not served; {_REMEDY}")
