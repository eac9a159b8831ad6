"""Puts a model behind engines: found, quantized, loaded, given its share of the memory, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.reader import Checkpoint
from quant.scheme import PRESETS, Scheme
from service.engine.device_thread import DeviceThread
from service.engine.loop import EngineLoop
from service.engine.runner import Runner
from service.engine.scheduler import Scheduler
from service.engine.supervision import FaultLimits
from service.errors import InvalidSettings, SelfCheckFailed
from service.host.machine import device_name, versions
from service.host.memory import cache_blocks, cache_budget
from service.host.one_token import describe_one_token
from service.host.self_check import check, check_prompts
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.devices import pick_device, pick_dtype
from service.models.loader import decoder_of, refuse_unsafe
from service.models.random_weights import random_decoder
from service.settings import BASELINE, Settings
from service.store.calibration import Calibration
from service.store.progress import Progress, silent
from service.store.quantized import quantized_folder
from service.store.resolve import is_quantized, resolve_model
from service.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Loaded:
    """A decoder, what is known of how it was quantized, and the folder it is from; None for random weights."""

    decoder: Decoder
    notes: Mapping[str, Any]
    folder: Path | None


@dataclass(frozen=True, slots=True)
class Variant:
    """One precision of the model, loaded and running.

    cache_budget_bytes: what its KV cache may take.   generation: how many weights it has had.
    """

    engine: EngineLoop
    decoder: Decoder
    runner: Runner
    notes: Mapping[str, Any]
    folder: Path | None
    cache_budget_bytes: int
    generation: int = 1
    loaded_at: datetime = field(default_factory=lambda: datetime.now(UTC))


class Host:
    """Every variant of one model. Their engines are started; `stop` ends them."""

    def __init__(
        self, name: str, variants: dict[str, Variant], tokenizer: Tokenizer, device_thread: DeviceThread
    ) -> None:
        self.name = name
        self.variants = variants
        self.tokenizer = tokenizer
        self.device_thread = device_thread

    @property
    def engines(self) -> dict[str, EngineLoop]:
        return {name: variant.engine for name, variant in self.variants.items()}

    def stop(self) -> None:
        for variant in self.variants.values():
            variant.engine.stop()

    def info(self) -> dict[str, object]:
        """What /info answers."""
        first = next(iter(self.variants.values()))
        device = first.runner.device
        decoders = {name: variant.decoder for name, variant in self.variants.items()}
        return {
            "model": self.name,
            "family": first.decoder.config.family,
            "max_model_len": first.decoder.config.max_model_len,
            "variants": {name: _describe(variant) for name, variant in self.variants.items()},
            "one_token": describe_one_token(decoders, BASELINE, device_name(device)),
            "device": device_name(device),
            "gpu_memory_bytes": _gpu_memory_bytes(device),
            "versions": versions(),
        }

    def self_check(self) -> dict[str, str]:
        """Run a few fixed prompts through every variant: {variant: reason} of those that must not serve."""
        refused: dict[str, str] = {}
        for name, variant in self.variants.items():
            try:
                self.check(name, variant.decoder)
            except SelfCheckFailed as error:
                refused[name] = error.message
        return refused

    def check(self, name: str, decoder: Decoder) -> None:
        """Raise SelfCheckFailed unless a decoder may serve as this variant."""
        baseline = self.variants.get(BASELINE) if name != BASELINE else None
        prompts = check_prompts(self.tokenizer, decoder.config.max_model_len)
        check(decoder, baseline.decoder if baseline else None, prompts, self.device_thread)


def open_host(settings: Settings, on_progress: Progress = silent) -> Host:
    """Load what the settings name.

    Raises:
        StartupError: any leaf of it, with a message that says what to change.
        CheckpointError: the weights are corrupt or quantized in a way that is not served.
    """
    device_thread = DeviceThread()
    return device_thread.run(_open, settings, device_thread, on_progress)


def _open(settings: Settings, device_thread: DeviceThread, on_progress: Progress) -> Host:
    """`open_host` on the thread that computes."""
    device = pick_device(settings.device)
    if settings.scheme not in PRESETS or not PRESETS[settings.scheme].is_int8:
        served = ", ".join(name for name, scheme in PRESETS.items() if scheme.is_int8)
        raise InvalidSettings(f"scheme = {settings.scheme!r} is not an int8 scheme; choose one of {served}")
    folder = resolve_model(settings.model, settings.cache_dir, lambda stage: on_progress(stage, 0, 0))
    # Known before minutes of quantizing, not after them.
    ModelConfig.load(folder, settings.max_model_len)
    tokenizer = Tokenizer.from_folder(folder)
    loaded = {name: _load_variant(name, folder, settings, device, on_progress) for name in settings.variants}
    reloadable = [variant.decoder.weight_bytes for name, variant in loaded.items() if name != BASELINE]
    room = max(reloadable, default=0) if settings.reload_room else 0
    host = Host(settings.model or folder.name, {}, tokenizer, device_thread)
    try:
        for name, variant in loaded.items():
            budget = settings.kv_cache_bytes or cache_budget(device, len(loaded) - len(host.variants), room)
            host.variants[name] = start_variant(
                name, variant, settings, budget, device_thread, tokenizer.eos_ids, on_progress
            )
    except BaseException:
        host.stop()
        raise
    return host


def start_variant(
    name: str,
    loaded: Loaded,
    settings: Settings,
    kv_cache_bytes: int,
    device_thread: DeviceThread,
    eos_ids: frozenset[int],
    on_progress: Progress = silent,
) -> Variant:
    """Give a decoder its KV cache, warm it up, and start its engine.

    Raises:
        InvalidSettings: the cache would not hold one request of max_model_len tokens.
    """
    decoder, block_size = loaded.decoder, settings.block_size
    num_blocks = cache_blocks(name, decoder, settings, kv_cache_bytes)
    limits = settings.max_num_requests, settings.step_tokens(decoder.embedding.device.type)
    runner = Runner(decoder, num_blocks, block_size, *limits, use_graphs=settings.cuda_graphs)
    runner.warm_up(lambda done, total: on_progress(f"capturing {name}", done, total))
    engine = EngineLoop(
        name,
        Scheduler(num_blocks, block_size, *limits, eos_ids),
        runner,
        device_thread,
        decoder.config.max_model_len,
        settings.max_waiting,
        str(decoder.dtype).removeprefix("torch."),
        decoder.weight_bytes,
        FaultLimits(settings.engine_restarts, settings.engine_restart_window_s, settings.step_timeout_s),
    )
    return Variant(engine.start(), decoder, runner, loaded.notes, loaded.folder, kv_cache_bytes)


def _load_variant(name: str, folder: Path, settings: Settings, device: torch.device, on_progress: Progress) -> Loaded:
    scheme = Scheme.preset(BASELINE if name == BASELINE else settings.scheme).with_alpha(settings.alpha)
    scheme = scheme.with_kv(settings.kv)
    if settings.random_weights:
        config = ModelConfig.load(folder, settings.max_model_len)
        dtype = pick_dtype(settings.dtype, config, device)
        notes = {"scheme": scheme.name, "description": scheme.describe(), "calibration": "random weights"}
        return Loaded(random_decoder(config, scheme, dtype, device, settings.seed), notes, None)
    # A folder that is quantized already says for itself what the settings leave open.
    kv = settings.kv if name != BASELINE and is_quantized(folder) else scheme.kv
    if name == BASELINE:
        folder = _baseline_folder(folder, settings, on_progress)
    elif not is_quantized(folder):
        calibration = Calibration(settings.calibration, settings.seed, settings.calibration_windows)
        folder = quantized_folder(folder, scheme, calibration, settings.cache_dir, device, on_progress)
    on_progress(f"loading {name}", 0, 0)
    config = ModelConfig.load(folder, settings.max_model_len)
    refuse_unsafe(folder)
    checkpoint = Checkpoint.open(folder, pick_dtype(settings.dtype, config, device), device)
    decoder = decoder_of(config, checkpoint, kv)
    return Loaded(decoder, variant_notes(checkpoint, decoder, scheme), folder)


def variant_notes(checkpoint: Checkpoint, decoder: Decoder, scheme: Scheme) -> dict[str, Any]:
    """What a checkpoint says of itself: the settings' scheme is another where it was quantized elsewhere."""
    schemes = [stored.with_kv(decoder.kv) for stored in checkpoint.schemes] or [scheme]
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


def _describe(variant: Variant) -> dict[str, object]:
    return {
        "scheme": variant.notes.get("scheme"),
        "description": variant.notes.get("description"),
        "alpha": variant.notes.get("alpha"),
        "calibration": variant.notes.get("calibration"),
        "dtype": variant.engine.dtype,
        "kv_cache_dtype": str(variant.decoder.kv_dtype).removeprefix("torch."),
        "weight_bytes": variant.decoder.weight_bytes,
        "kv_cache_bytes": variant.runner.kv_cache_bytes,
        "max_num_requests": variant.runner.max_requests,
        "checkpoint": None if variant.folder is None else variant.folder.name,
        "generation": variant.generation,
        "loaded_at": variant.loaded_at.isoformat(timespec="seconds"),
    }


def _gpu_memory_bytes(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
