"""Loads one precision of a model, quantizing it if needed, and starts its engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.json_file import read_json
from quant.checkpoint.notes import NOTES_NAME
from quant.checkpoint.reader import Checkpoint
from quant.scheme import KVStorage, Scheme
from service.engine.api import VariantInfo
from service.engine.device.device_thread import DeviceThread
from service.engine.device.ranks import Lead
from service.engine.device.runner import Runner
from service.engine.drafts.speculation import Speculation
from service.engine.grammar import Grammars
from service.engine.loop import EngineLoop
from service.engine.pacing import default_target_s
from service.engine.scheduler import Scheduler
from service.engine.shapes import Shape
from service.errors import InvalidSettings
from service.host.limits import fault_limits, grammar_limits
from service.host.memory import cache_blocks, served_len
from service.host.ranks.group import RankGroup
from service.models.attention import KVCache
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.devices import pick_dtype
from service.models.loader import decoder_of, opened, refuse_unsafe
from service.models.random_weights import random_decoder
from service.models.sharding import ALONE, Ranks
from service.settings import BASELINE, Settings
from service.store.calibration import Calibration
from service.store.progress import Progress, silent
from service.store.quantized import quantized_folder
from service.store.resolve import is_quantized, resolve_model
from service.store.sink import with_options

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A decoder, notes on how it was quantized, and its checkpoint folder (None for random weights)."""

    decoder: Decoder
    notes: Mapping[str, Any]
    folder: Path | None


@dataclass(frozen=True, slots=True)
class Variant:
    """One precision of the model, loaded and running.

    cache_budget_bytes: limit of its KV cache.   generation: 1 at start, increased by every reload.
    self_check_kl: what the last self-check measured; see `VariantInfo`.
    """

    engine: EngineLoop
    decoder: Decoder
    runner: Runner
    notes: Mapping[str, Any]
    folder: Path | None
    cache_budget_bytes: int
    generation: int = 1
    loaded_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    self_check_kl: float | None = None


def start_variant(
    name: str,
    loaded: Loaded,
    settings: Settings,
    *,
    kv_cache_bytes: int,
    device_thread: DeviceThread,
    eos_ids: frozenset[int],
    grammars: Grammars | None = None,
    on_progress: Progress = silent,
    group: RankGroup | None = None,
) -> Variant:
    """Allocate a decoder's KV cache, warm it up, and start its engine; on the ranks of a group, if it has any.

    Raises:
        InvalidSettings: the cache would not hold one request (see `served_len`), or drafts would change answers.
    """
    refuse_drafts(name, loaded.decoder, settings)
    decoder, block_size = loaded.decoder, settings.block_size
    max_len = served_len(name, decoder, settings, kv_cache_bytes)
    num_blocks = cache_blocks(name, decoder, settings, kv_cache_bytes, max_len)
    if group is not None:
        group.start(name, num_blocks)
    runner = runner_for(decoder, num_blocks, settings, lead=None if group is None else group.lead(name))
    runner.warm_up(lambda done, total: on_progress(f"capturing {name}", done, total))
    engine = EngineLoop(
        name,
        Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_requests=runner.max_requests,
            max_batched_tokens=runner.max_tokens,
            eos_ids=eos_ids,
            has_prefix_cache=settings.prefix_cache,
            target_itl_s=target_s(name, runner.step_times_s, settings),
            step_times_s=runner.step_times_s,
            speculation=None
            if settings.speculate == "none"
            else Speculation(
                settings.max_draft_tokens, min(runner.max_requests, runner.max_tokens), runner.step_times_s
            ),
        ),
        runner,
        device_thread=device_thread,
        max_model_len=max_len - len(decoder.sink_ids),
        first_ids=decoder.sink_ids,
        max_waiting=settings.max_waiting,
        dtype=str(decoder.dtype).removeprefix("torch."),
        weight_bytes=decoder.weight_bytes,
        limits=fault_limits(settings),
        grammars=grammars,
        mask_s=grammar_limits(settings).mask_s,
    )
    return Variant(engine.start(), decoder, runner, loaded.notes, loaded.folder, kv_cache_bytes)


def target_s(name: str, step_times_s: Mapping[Shape, float], settings: Settings) -> float:
    """The longest step of a variant while it writes answers, in seconds; told in the log where it has any effect."""
    given_ms = settings.target_itl_ms
    found_s = default_target_s(step_times_s) if given_ms is None else given_ms / 1000
    if step_times_s:
        logger.info("%s: prompts are read in steps of up to %g ms beside answers", name, round(1000 * found_s, 1))
    return found_s


def runner_for(
    decoder: Decoder,
    num_blocks: int,
    settings: Settings,
    *,
    caches: list[KVCache] | None = None,
    lead: Lead | None = None,
) -> Runner:
    """A runner of the settings' sizes. caches, lead: see `Runner`."""
    return Runner(
        decoder,
        num_blocks=num_blocks,
        block_size=settings.block_size,
        max_requests=settings.max_num_requests,
        max_tokens=settings.step_tokens(decoder.embedding.device.type),
        use_graphs=settings.cuda_graphs,
        caches=caches,
        lead=lead,
        has_drafts=settings.speculate != "none",
    )


def refuse_drafts(name: str, decoder: Decoder, settings: Settings) -> None:
    """Refuse to speculate with a decoder whose rows depend on each other.

    Raises:
        InvalidSettings: a wrong draft in a step would change the other tokens of the step.
    """
    if settings.speculate != "none" and not decoder.is_row_independent:
        raise InvalidSettings(
            f"speculate is {settings.speculate!r}, but the scheme of {name} rounds all rows of a step together, so "
            "drafts would change answers: leave speculate none, or serve another scheme"
        )


def load_variant(
    name: str,
    folder: Path,
    settings: Settings,
    device: torch.device,
    on_progress: Progress,
    *,
    group: RankGroup | None = None,
) -> Loaded:
    """Load a variant's weights, quantized first if need be; the rank's part of them, if there is a group."""
    scheme = scheme_of(name, settings)
    kv: KVStorage | None = scheme.kv
    if not settings.random_weights:
        if name != BASELINE and is_quantized(folder):
            # The folder itself determines what the settings leave open.
            kv = settings.kv
        if name == BASELINE:
            folder = _baseline_folder(folder, settings, on_progress)
        elif is_quantized(folder):
            refuse_other_options(folder, settings)
        else:
            scheme = with_options(folder, scheme, settings)
            calibration = Calibration(settings.calibration, settings.seed, settings.calibration_windows)
            folder = quantized_folder(folder, scheme, calibration, settings.cache_dir, device, on_progress=on_progress)
        on_progress(f"loading {name}", 0, 0)
        refuse_unsafe(folder)
    if group is not None:
        group.load(name, folder, kv)
    ranks = ALONE if group is None else group.ranks
    return load_part(name, folder, kv, settings=settings, device=device, ranks=ranks)


def refuse_other_options(folder: Path, settings: Settings) -> None:
    """Refuse settings that ask an int8 folder for what it was not made with.

    Raises:
        InvalidSettings: sink is on and the folder has none, or off and it has one; or rotate is, and it is not rotated.
    """
    notes = read_json(folder / NOTES_NAME) if (folder / NOTES_NAME).is_file() else {}
    if settings.rotate and not notes.get("is_rotated"):
        raise InvalidSettings(
            f"rotate is true, but {folder} was quantized without a rotation, which changes every weight: leave rotate "
            "off, or quantize the float model again"
        )
    has_sink = bool(notes.get("sink"))
    if settings.sink == ("off" if has_sink else "on"):
        raise InvalidSettings(
            f"sink is {settings.sink}, but {folder} was quantized {'with' if has_sink else 'without'} a sink, on which "
            "its scales depend: leave sink auto, or quantize the float model again"
        )


def load_part(
    name: str, folder: Path, kv: KVStorage | None, *, settings: Settings, device: torch.device, ranks: Ranks
) -> Loaded:
    """The rank's part of a variant, of a folder that holds it as it is served, or random weights of its shapes.

    Args:
        kv: storage of keys and values; None for the folder's own.
    """
    if settings.random_weights:
        scheme = scheme_of(name, settings)
        config = ModelConfig.load(folder, settings.max_model_len)
        dtype = pick_dtype(settings.dtype, config, device)
        decoder = random_decoder(config, scheme, dtype, device, settings.seed, ranks=ranks)
        notes = {"scheme": scheme.name, "description": scheme.describe(), "calibration": "random weights"}
        loaded = Loaded(decoder, notes, None)
    else:
        loaded = checkpoint_part(name, folder, kv, settings=settings, device=device, ranks=ranks)
    # Before caches are sized by what is free.
    width = loaded.decoder.config.hidden_size
    ranks.reserve(settings.step_tokens(device.type), width, loaded.decoder.dtype)
    return loaded


def checkpoint_part(
    name: str,
    folder: Path,
    kv: KVStorage | None,
    *,
    settings: Settings,
    device: torch.device,
    ranks: Ranks,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """The rank's part of a variant, of a folder that holds it as it is served.

    Args:
        kv: see `load_part`.
        dtype: of what is not quantized; None for the settings' or the folder's.
    """
    scheme = scheme_of(name, settings)
    dtype = dtype or pick_dtype(settings.dtype, ModelConfig.load(folder, settings.max_model_len), device)
    config, checkpoint = opened(folder, dtype, device, settings.max_model_len)
    decoder = decoder_of(config, checkpoint, kv, scheme.head, ranks=ranks)
    return Loaded(decoder, variant_notes(checkpoint, decoder, scheme), folder)


def scheme_of(name: str, settings: Settings) -> Scheme:
    """The scheme that the settings ask of a variant."""
    scheme = Scheme.preset(BASELINE if name == BASELINE else settings.scheme).with_alpha(settings.alpha)
    return scheme.with_kv(settings.kv).with_head(settings.head)


def variant_notes(checkpoint: Checkpoint, decoder: Decoder, scheme: Scheme) -> dict[str, Any]:
    """The checkpoint's own notes on its quantization; if made elsewhere, its scheme may differ from the settings'."""
    schemes = [stored.with_kv(decoder.kv).with_head(scheme.head) for stored in checkpoint.schemes] or [scheme]
    names = {"scheme": checkpoint.scheme_name or scheme.name, "description": " ".join(s.describe() for s in schemes)}
    return {**checkpoint.notes, **names}


def _baseline_folder(folder: Path, settings: Settings, on_progress: Progress) -> Path:
    if settings.baseline is not None:
        folder = resolve_model(settings.baseline, settings.cache_dir, lambda stage: on_progress(stage, 0, 0))
    if is_quantized(folder):
        raise InvalidSettings(
            f"{folder} is quantized, so it cannot be the fp16 baseline: name the float model with --baseline, "
            "or serve --variants w8a8 alone"
        )
    return folder


def describe(variant: Variant) -> VariantInfo:
    """The variant's part of GET /info."""
    notes = variant.notes
    return VariantInfo(
        scheme=notes.get("scheme"),
        description=notes.get("description"),
        alpha=notes.get("alpha"),
        calibration=notes.get("calibration"),
        dtype=variant.engine.dtype,
        kv_cache_dtype=str(variant.decoder.kv_dtype).removeprefix("torch."),
        weight_bytes=variant.decoder.weight_bytes,
        kv_cache_bytes=variant.runner.kv_cache_bytes,
        max_num_requests=variant.runner.max_requests,
        checkpoint=None if variant.folder is None else variant.folder.name,
        generation=variant.generation,
        loaded_at=variant.loaded_at.isoformat(timespec="seconds"),
        self_check_kl=variant.self_check_kl,
        sink=list(variant.decoder.sink_ids),
    )
