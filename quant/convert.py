"""A float checkpoint in, an int8 checkpoint out: smoothing folded, weights rounded, in compressed-tensors' layout."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import CODE_MAX, __version__
from quant.checkpoint import NOTES_NAME
from quant.compressed import parse, render
from quant.scheme import Scheme
from quant.smooth import SmoothGroup, fold
from quant.tensors import CheckpointError, ShardWriter, TensorFiles, cast, read_json

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_EMBEDDINGS = ("embed_tokens", "embed_positions", "embed_in", "wte", "wpe")


def quantize_weight(
    weight: Tensor, strategy: Literal["tensor", "channel"], scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to int8.

    scale = round(absmax / 127 to scale_dtype)        codes = clamp(rint(weight / scale), -127, 127)

    The scale is rounded first: codes made with the unrounded scale would stand for other values once it is stored.

    Args:
        weight: [N, K] float.
        strategy: "channel" (a scale per row) or "tensor" (one).
        scale_dtype: what the scale is stored in.

    Returns:
        codes [N, K] int8 in -127..127 and scale [N, 1] (channel) or [1] (tensor) in scale_dtype, positive. A row of
        zeros gets scale 1.

    Raises:
        ValueError: the weight is NaN or infinite, or its scale overflows scale_dtype.

    Source: SmoothQuant (arXiv 2211.10438), equation 1.
    """
    weight = weight.float()
    absmax = weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().amax().reshape(1)
    scale = static_scale(absmax, scale_dtype)
    codes = (weight / scale.float()).round_().clamp_(-CODE_MAX, CODE_MAX).to(torch.int8)
    return codes, scale


def static_scale(absmax: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The scale absmax / 127 in scale_dtype, such that absmax is at most half a code beyond 127.

    Where absmax is 0 the scale is 1. Where rounding down loses more than that (float16's subnormals), the next value
    up is taken.

    Raises:
        ValueError: absmax is NaN or infinite, or absmax / 127 overflows scale_dtype.
    """
    scale = (absmax.float() / CODE_MAX).to(scale_dtype)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"its largest magnitude is {absmax.max().item():g}: no finite scale in {scale_dtype}")
    saturates = absmax.float() > (CODE_MAX + 0.5) * scale.float()
    # Positive floats are ordered as their bits are, so one more is the next value up, in any float type.
    bits = scale.view(torch.int16 if scale.element_size() == 2 else torch.int32)
    scale = torch.where(saturates, (bits + 1).view(scale_dtype), scale)
    return torch.where(absmax == 0, torch.ones_like(scale), scale)


def quantize_checkpoint(
    source: Path,
    out: Path,
    scheme: Scheme,
    absmax: dict[str, Tensor],
    groups: Sequence[SmoothGroup],
    linear_names: Sequence[str],
    dtype: torch.dtype,
    notes: dict[str, Any],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the int8 checkpoint of a float one. The folder appears whole or not at all.

    One group of Linears that smoothing ties together is in memory as float32 at a time.

    Args:
        source: folder of a float model: config.json and safetensors.
        out: folder to create; it may exist only if it is empty.
        scheme: an int8 scheme.
        absmax: activation ranges by Linear name, from `calibrate`; may be empty if the scheme needs none.
        groups: what to smooth, if the scheme smooths.
        linear_names: the Linears to quantize; every other matrix stays float and is listed in `ignore`, as is lm_head.
        dtype: float16, bfloat16 or float32, of norms, embeddings, biases and stored scales.
        notes: added to ottava.json beside version, scheme, alpha and kv.
        on_progress: called with (Linears done, total).

    Raises:
        CheckpointError: source is not a float checkpoint, or lacks one of the Linears.
        FileExistsError: out is there and not empty.
        ValueError: the scheme is float, or smooths without groups, a range is missing, or a weight has no finite scale.
    """
    if not scheme.is_int8:
        raise ValueError(f"scheme {scheme.name!r} is float: there is nothing to quantize; serve the source itself")
    if scheme.smoothing is not None and not groups:
        raise ValueError(f"scheme {scheme.name!r} smooths and no groups say what; name them, or set smoothing to None")
    refuse_occupied(out)
    config = read_json(source / "config.json")
    if parse(config) is not None:
        raise CheckpointError(f"{source} is quantized already; start from the float model")
    files = TensorFiles(source)
    _require_weights(files, linear_names)
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling: renaming is atomic within one file system only.
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
    try:
        part.chmod(0o755)
        _copy_companions(source, part)
        writer = ShardWriter(part)
        for name, tensor in _quantized_tensors(files, scheme, absmax, groups, linear_names, dtype, on_progress):
            writer.add(name, tensor)
        writer.close()
        _write_json(part / "config.json", _int8_config(config, scheme, _ignored(files, linear_names), dtype))
        own = {"version": __version__, "scheme": scheme.name, "description": scheme.describe()}
        _write_json(part / NOTES_NAME, {**own, "alpha": scheme.smoothing, "kv": scheme.kv, **notes})
        part.replace(out)
    except BaseException:
        shutil.rmtree(part)
        raise


def refuse_occupied(out: Path) -> None:
    """Raise FileExistsError unless out can be created, or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; remove it or name another folder")


def _quantized_tensors(
    files: TensorFiles,
    scheme: Scheme,
    absmax: dict[str, Tensor],
    groups: Sequence[SmoothGroup],
    linear_names: Sequence[str],
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the int8 checkpoint: the modules cluster by cluster, then what no cluster holds."""
    linears, written, num_done = set(linear_names), set[str](), 0
    for cluster in _clusters(groups if scheme.smoothing is not None else (), linear_names):
        stored = [f"{module}.{suffix}" for module in cluster.modules for suffix in ("weight", "bias")]
        state = {name: files.get(name) for name in stored if name in files}
        written |= set(state)
        if cluster.groups and scheme.smoothing is not None:
            absmax = fold(state, cluster.groups, absmax, scheme.smoothing, dtype)
        for module in cluster.modules:
            if module in linears:
                yield from _int8_tensors(module, state.pop(f"{module}.weight"), scheme, absmax, dtype)
                num_done += 1
                if on_progress is not None:
                    on_progress(num_done, len(linears))
        for name, tensor in state.items():
            yield name, cast(tensor, dtype, name)
    for name in files.names:
        if name not in written:
            tensor = files.get(name)
            yield name, cast(tensor, dtype, name) if tensor.is_floating_point() else tensor


def _int8_tensors(
    name: str, weight: Tensor, scheme: Scheme, absmax: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one int8 Linear except its bias."""
    assert scheme.weight != "float"
    try:
        codes, scale = quantize_weight(weight, scheme.weight, dtype)
    except ValueError as error:
        raise ValueError(f"{name}.weight cannot be quantized: {error}") from error
    yield f"{name}.weight", codes
    yield f"{name}.weight_scale", scale
    if scheme.activation == "static":
        if name not in absmax:
            raise ValueError(f"scheme {scheme.name!r} needs the activation range of {name}; calibrate the model first")
        yield f"{name}.input_scale", static_scale(absmax[name].amax().reshape(1), dtype)


@dataclass(slots=True)
class _Cluster:
    """Modules that smoothing ties together, with the groups that tie them; a lone Linear has none."""

    modules: list[str]
    groups: list[SmoothGroup]


def _clusters(groups: Sequence[SmoothGroup], linear_names: Sequence[str]) -> list[_Cluster]:
    """Groups joined where they share a module (up_proj is the sink of one, the source of another), order kept."""
    clusters: list[_Cluster] = []
    for group in groups:
        names = [group.source, *group.sinks]
        touched = [cluster for cluster in clusters if not set(names).isdisjoint(cluster.modules)]
        joined = _Cluster(
            list(dict.fromkeys([*(name for cluster in touched for name in cluster.modules), *names])),
            [*(member for cluster in touched for member in cluster.groups), group],
        )
        clusters = [cluster for cluster in clusters if cluster not in touched] + [joined]
    tied = {name for cluster in clusters for name in cluster.modules}
    return clusters + [_Cluster([name], []) for name in linear_names if name not in tied]


def _ignored(files: TensorFiles, linear_names: Sequence[str]) -> list[str]:
    """lm_head, and every other matrix left float that a reader could take for a Linear."""
    quantized = set(linear_names)
    matrices = [
        name.removesuffix(".weight")
        for name in files.names
        if name.endswith(".weight") and len(files.shape(name)) == 2 and name.split(".")[-2] not in _EMBEDDINGS
    ]
    return sorted({"lm_head"} | {name for name in matrices if name not in quantized})


def _int8_config(config: dict[str, Any], scheme: Scheme, ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """config.json with the quantization and the dtype of what stays float, under both names that readers use."""
    stored = str(dtype).removeprefix("torch.")
    names = {"dtype": stored} | ({"torch_dtype": stored} if "torch_dtype" in config else {})
    return {**config, **names, "quantization_config": render(scheme, ignore)}


def _require_weights(files: TensorFiles, linear_names: Sequence[str]) -> None:
    missing = [name for name in linear_names if f"{name}.weight" not in files]
    if missing:
        raise CheckpointError(f"{files.folder} has no tensor {missing[0]}.weight; is it a checkpoint of this model?")
    if "lm_head" in linear_names:
        raise ValueError("lm_head stays float: its logits decide the token; leave it out of linear_names")


def _copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, generation settings, chat templates, licence: everything a server needs beside the weights."""
    left_out = {"config.json", NOTES_NAME}
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
        if path.is_file() and path.name not in left_out and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, out / templates.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
