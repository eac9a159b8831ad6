"""Turns a float checkpoint into an int8 one in compressed-tensors' layout, layer by layer."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant import __version__
from quant.checkpoint.compressed_tensors import parse, render
from quant.checkpoint.json_file import read_json
from quant.checkpoint.notes import NOTES_NAME, notes_of
from quant.checkpoint.safetensors_files import ShardWriter, TensorFiles, cast
from quant.checkpoint.sha256sums import write_sums
from quant.checkpoint.sink import SINK_NAME, Sink
from quant.convert.decoder_layers import LayerStream, has_own_head
from quant.convert.layer import LayerQuantizer, Recipe
from quant.convert.massive import joined, noted_tokens
from quant.convert.resume import PartFolder
from quant.convert.rotate import opener
from quant.errors import CheckpointError

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_EMBEDDINGS = ("embed_tokens", "embed_positions", "embed_in", "wte", "wpe")

LayerProgress = Callable[[int, int, str], None]
"""Called with (layers done, total, a note about the last one)."""


def quantize_checkpoint(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    notes: dict[str, Any] | None = None,
    on_progress: LayerProgress | None = None,
) -> None:
    """Write the int8 checkpoint of a float one. The folder appears complete or not at all.

    One decoder layer is in memory at a time, in float32, with the hidden states of all windows, twice, and
    `quant.convert.inputs.SAMPLED_ROWS` tokens of its Linears' inputs. Layers that are done are kept beside `out`:
    called again with the same arguments after an interruption, it goes on with the next one and gives the same bytes.

    Args:
        source: folder of a float model that transformers knows: config.json and safetensors, sharded or not.
        out: folder to create; if it exists, it must be empty.
        recipe: what to quantize and how; matrices that stay float are listed in `ignore`.
        notes: added to ottava.json beside the scheme and what was chosen for each layer.

    Raises:
        CheckpointError: source is not a float checkpoint, or lacks one of the Linears.
        InvalidScheme: not even the smallest group size divides every width.
        Unquantizable: the model has no list of decoder layers, or a weight or an activation has no finite scale.
        FileExistsError: out exists and is not empty.
        ValueError: the scheme is float, smooths without groups, or is calibrated without windows; or lm_head is among
            the Linears.
        OSError: a file cannot be read or written, as on a full disk; the layers that are done are kept.
    """
    _check(recipe)
    refuse_occupied(out)
    config = read_json(source / "config.json")
    if parse(config) is not None:
        raise CheckpointError(f"{source} is quantized already; start from the float model")
    notes, files = notes or {}, TensorFiles(source)
    _require_weights(files, recipe.linear_names)
    open_files = opener(recipe.stream)
    stream = LayerStream(source, torch.float32, torch.device(recipe.device), open_files)
    recipe = replace(recipe, scheme=recipe.scheme.fitted(stream.widths(recipe.linear_names)))
    settings = _fingerprint(files, recipe, notes)
    ignored = _ignored(files, recipe.linear_names)
    is_apart = recipe.stream is not None or has_own_head(stream.model, files)
    if stream.model.config.tie_word_embeddings and is_apart:
        # Readers differ in what they believe if the two contradict each other; the weights are what was trained.
        config["tie_word_embeddings"] = False
    # Closed: an open file keeps every page that was read from it in memory.
    del files
    part = PartFolder(out, settings)
    try:
        _quantize_layers(stream, part, recipe, on_progress)
        with part.whole() as folder:
            qkv = _write_tensors(open_files(source), folder, part, recipe.dtype)
            if recipe.scheme.sink:
                _sink_of(qkv, part, recipe.scheme.sink).save(folder, recipe.dtype)
            _write_json(folder / "config.json", _int8_config(config, recipe, ignored))
            _write_json(folder / NOTES_NAME, {**notes_of(recipe.scheme), **_layer_notes(part.notes), **notes})
            _copy_companions(source, folder)
            write_sums(folder)
    except OSError as error:
        raise OSError(
            f"{out} is not written: {error}; {part.num_done} of {len(stream.prefixes)} layers are kept in "
            f"{part.folder.name} beside it: make room, or mend what it says, and start again"
        ) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        # It would fail again, so nothing is kept.
        part.remove()
        raise


def _check(recipe: Recipe) -> None:
    """Raise ValueError unless the recipe holds what its scheme needs."""
    scheme = recipe.scheme
    if not scheme.is_int8:
        raise ValueError(f"scheme {scheme.name!r} is float: there is nothing to quantize; serve the source itself")
    if scheme.smoothing is not None and not recipe.groups:
        raise ValueError(f"scheme {scheme.name!r} smooths and no groups say what; name them, or set smoothing to None")
    if scheme.needs_calibration and recipe.windows is None:
        raise ValueError(f"scheme {scheme.name!r} is calibrated and no windows say on what; give calibration windows")
    if scheme.has_token_down and not recipe.down_names:
        raise ValueError(
            f"scheme {scheme.name!r} treats the last Linears of MLPs apart and no down_names say which; name them"
        )
    if scheme.is_rotated != (recipe.stream is not None):
        raise ValueError(
            f"scheme {scheme.label!r} and stream = {recipe.stream!r}: what rotates takes one, nothing else"
        )
    sink = scheme.sink
    if sink and recipe.windows is not None and not (recipe.windows[:, : len(sink)] == torch.tensor(sink)).all():
        raise ValueError(f"a window does not begin with the sink's tokens {list(sink)}; put them in front of all")


def refuse_occupied(out: Path) -> None:
    """Raise FileExistsError unless out can be created, or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; remove it or name another folder")


def _quantize_layers(stream: LayerStream, part: PartFolder, recipe: Recipe, on_progress: LayerProgress | None) -> None:
    """Quantize every layer that is not done yet into the part folder."""
    windows = recipe.windows if recipe.scheme.needs_calibration else None
    if windows is None and recipe.scheme.sink:
        windows = torch.tensor([recipe.scheme.sink])
    num_layers, num_found = len(stream.prefixes), part.num_done
    hidden: list[Tensor] = []
    if windows is not None and num_found < num_layers:
        hidden = stream.embed(windows)
        if num_found:
            hidden = [window.to(stream.device) for window in part.carried().values()]
    began = time.monotonic()
    for index in range(num_found, num_layers):
        done = LayerQuantizer(stream, index, recipe).quantize(hidden)
        hidden = done.hidden
        tensors = {name: _stored(name, tensor, recipe.dtype) for name, tensor in done.tensors.items()}
        if done.sink is not None:
            tensors[SINK_NAME] = done.sink
        part.add(tensors, done.notes, {f"{number:06d}": window for number, window in enumerate(hidden)})
        stream.drop(index)
        if on_progress is not None:
            left_s = (time.monotonic() - began) / (index + 1 - num_found) * (num_layers - index - 1)
            on_progress(index + 1, num_layers, f"error {done.notes['error']:.2%}, {left_s:.0f} s left")


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(tensor, dtype, name) if tensor.is_floating_point() else tensor


def _sink_of(qkv: Sequence[Tensor], part: PartFolder, token_ids: tuple[int, ...]) -> Sink:
    """The sink, of what the layers give for it and of what was carried out of the last one."""
    first = next(iter(part.carried().values()))
    return Sink(token_ids, tuple(qkv), first[0, : len(token_ids)].cpu())


def _write_tensors(files: TensorFiles, folder: Path, part: PartFolder, dtype: torch.dtype) -> list[Tensor]:
    """Write the layers' tensors and then all others. Returns what the layers give for a sink, which stands apart."""
    writer = ShardWriter(folder)
    written, of_sink = set(), []
    for tensors in part.layers():
        if SINK_NAME in tensors:
            of_sink.append(tensors.pop(SINK_NAME))
        written |= set(tensors)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    for name in files.names:
        if name not in written:
            writer.add(name, _stored(name, files.get(name), dtype))
    writer.close()
    return of_sink


def _fingerprint(files: TensorFiles, recipe: Recipe, notes: dict[str, Any]) -> str:
    """A digest of everything that determines the bytes that are written."""
    names = sorted(recipe.linear_names)
    how = (recipe.scheme, sorted(recipe.down_names), recipe.groups, recipe.dtype, recipe.seed, recipe.qkv_names)
    told = (__version__, names, how, sorted(notes.items()))
    digest = hashlib.sha256(repr(told).encode())
    if recipe.windows is not None:
        digest.update(recipe.windows.numpy().tobytes())
    for path in sorted({files.path(name) for name in files.names}):
        status = path.stat()
        digest.update(repr((str(path.resolve()), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def _layer_notes(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The choices by group, Linear and layer, of the whole model, and the massive tokens of its calibration."""
    whole: dict[str, Any] = {"alphas": {}, "ranges": {}, "splits": {}, "errors": [note["error"] for note in notes]}
    for note in notes:
        for kind in ("alphas", "ranges", "splits"):
            whole[kind] |= note.get(kind, {})
    whole["massive_tokens"] = [token._asdict() for token in joined(map(noted_tokens, notes))]
    distillation = [note["distillation"] for note in notes if "distillation" in note]
    return {**whole, **({"distillation": distillation} if distillation else {})}


def _ignored(files: TensorFiles, linear_names: Sequence[str]) -> list[str]:
    """lm_head, and every other float matrix that a reader could take for a Linear."""
    quantized = set(linear_names)
    matrices = [
        name.removesuffix(".weight")
        for name in files.names
        if name.endswith(".weight") and len(files.shape(name)) == 2 and name.split(".")[-2] not in _EMBEDDINGS
    ]
    return sorted({"lm_head"} | {name for name in matrices if name not in quantized})


def _int8_config(config: dict[str, Any], recipe: Recipe, ignore: list[str]) -> dict[str, Any]:
    """config.json with the quantization, and the dtype of float tensors under both names that readers use."""
    stored = str(recipe.dtype).removeprefix("torch.")
    names = {"dtype": stored} | ({"torch_dtype": stored} if "torch_dtype" in config else {})
    return {**config, **names, "quantization_config": render(recipe.scheme, ignore, recipe.down_names)}


def _require_weights(files: TensorFiles, linear_names: Sequence[str]) -> None:
    missing = [name for name in linear_names if f"{name}.weight" not in files]
    if missing:
        raise CheckpointError(f"{files.folder} has no tensor {missing[0]}.weight; is it a checkpoint of this model?")
    if "lm_head" in linear_names:
        raise ValueError("lm_head stays float: its logits decide the token; leave it out of linear_names")


def _copy_companions(source: Path, out: Path) -> None:
    """Copy what a server needs beside the weights: tokenizer, generation settings, chat templates, licence."""
    left_out = {"config.json", NOTES_NAME}
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
        if path.is_file() and path.name not in left_out and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, out / templates.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
