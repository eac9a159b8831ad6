"""Loads all variants of one model into engines of this process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from kernels.cpu.library import WHY_NOT
from quant.analysis.perplexity import LogitsOf
from quant.scheme import MAX_SINK_TOKENS, PRESETS
from service.engine.api import HostInfo, RankInfo
from service.engine.device.device_thread import DeviceThread
from service.engine.grammar import Grammars
from service.engine.loop import EngineLoop
from service.errors import InvalidRequest, InvalidSettings, SelfCheckFailed, UnsupportedModel
from service.host.generation_config import sampling_defaults
from service.host.limits import busy_poll_s, grammar_limits
from service.host.machine import device_name, versions
from service.host.memory import cache_budget, step_bytes
from service.host.one_token import describe_one_token
from service.host.ranks.group import RankGroup, layout_of, measured, refuse_missing_gpus
from service.host.ranks.messages import key_of
from service.host.self_check import CHECK_PROMPTS, check, check_prompts
from service.host.server import Reload, nothing_to_reload
from service.host.variants import Variant, describe, load_variant, start_variant
from service.models.config import ModelConfig
from service.models.decoder import Decoder, score
from service.models.devices import pick_device
from service.models.sharding import ALONE, refuse_uneven
from service.process import keep_freed_memory
from service.settings import BASELINE, Settings
from service.store.progress import Progress, silent
from service.store.resolve import resolve_model
from service.store.tokenizer import tokenizer_folder
from service.store.tokenizer_file import library_faults, unusable
from service.text.grammars.compiler import RulesCompiler
from service.text.grammars.trials import TrialParent
from service.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class ModelHost:
    """All variants of one model, with running engines; `stop` stops them.

    Args:
        name: the model's name.
        tokenizer: shared by all variants.
        folder: contains the tokenizer's files.
        device_thread: lets one variant at a time compute.
        grammars: compiles the grammars of requests; None if the engines accept none.
        sampling_defaults: see `HostInfo`.
        group: the other ranks of the decoders; None if there are none.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        *,
        folder: Path,
        device_thread: DeviceThread,
        grammars: Grammars | None = None,
        sampling_defaults: Mapping[str, float] | None = None,
        group: RankGroup | None = None,
        busy_poll_s: float = 0.0,
    ) -> None:
        self.name = name
        self._sampling_defaults = sampling_defaults or {}
        self.variants: dict[str, Variant] = {}
        self.tokenizer = tokenizer
        self.tokenizer_folder = folder
        self.device_thread = device_thread
        self.grammars = grammars
        self.group = group
        self.busy_poll_s = busy_poll_s
        self.reload: Reload = nothing_to_reload

    @property
    def engines(self) -> Mapping[str, EngineLoop]:
        return {name: variant.engine for name, variant in self.variants.items()}

    def stop(self, timeout_s: float = 10.0) -> None:
        for variant in self.variants.values():
            variant.engine.stop(timeout_s)
        if self.group is not None:
            self.group.close()
        if self.grammars is not None:
            self.grammars.close()

    def info(self) -> HostInfo:
        """The answer to GET /info."""
        first = next(iter(self.variants.values()))
        device = first.runner.device
        decoders = {name: variant.decoder for name, variant in self.variants.items()}
        return HostInfo(
            model=self.name,
            family=first.decoder.config.family,
            max_model_len=min(variant.decoder.max_model_len for variant in self.variants.values()),
            vocab_size=min(decoder.config.vocab_size for decoder in decoders.values()),
            variants={name: describe(variant) for name, variant in self.variants.items()},
            one_token=describe_one_token(decoders, BASELINE, device_name(device)),
            sampling_defaults=self._sampling_defaults,
            device=device_name(device),
            gpu_memory_bytes=_gpu_memory_bytes(device),
            versions=versions(),
            tensor_parallel=1 if self.group is None else self.group.ranks.size,
            ranks=self.device_thread.run(self._ranks, device),
        )

    def _ranks(self, device: torch.device) -> list[RankInfo]:
        """Each rank of the model, as it is now."""
        sizes = {name: (one.decoder.weight_bytes, one.runner.kv_cache_bytes) for name, one in self.variants.items()}
        if self.group is None:
            found = measured(ALONE, device, list(sizes.values()))
        else:
            keys = [key_of(name, variant.generation) for name, variant in self.variants.items()]
            found = self.group.measured(device, dict(zip(keys, sizes.values(), strict=True)))
        return [
            RankInfo(
                rank,
                pid,
                device.type if device.type == "cpu" else f"{device.type}:{(device.index or 0) + rank}",
                dict(zip(sizes, counts[::2], strict=True)),
                dict(zip(sizes, counts[1::2], strict=True)),
                num_free if device.type == "cuda" else None,
            )
            for rank, (pid, num_free, *counts) in enumerate(found)
        ]

    def self_check(self) -> dict[str, str]:
        """Run a few fixed prompts through every variant. Returns {variant: reason} for those that must not serve."""
        refused: dict[str, str] = {}
        for name, variant in self.variants.items():
            try:
                self.variants[name] = replace(
                    variant, self_check_kl=self.check(name, variant.decoder, variant.generation)
                )
            except SelfCheckFailed as error:
                refused[name] = error.message
        return refused

    def check(self, name: str, decoder: Decoder, generation: int = 1) -> float | None:
        """Run the self-check on a decoder that is to serve as this variant; see `self_check.check`.

        Args:
            generation: of its weights.
        """
        baseline = self.variants.get(BASELINE) if name != BASELINE else None
        prompts = check_prompts(self.tokenizer, decoder.max_model_len)
        compared = None if baseline is None else self._scorer(BASELINE, baseline.decoder)
        return check(self._scorer(key_of(name, generation), decoder), compared, prompts, self.device_thread)

    def _scorer(self, name: str, decoder: Decoder) -> LogitsOf:
        """Computes the logits of a decoder, on all its ranks. name: see `key_of`."""
        return partial(score, decoder) if self.group is None else partial(self.group.score, name, decoder)


def open_model(settings: Settings, on_progress: Progress = silent, trials: TrialParent | None = None) -> ModelHost:
    """Load the model of the settings and start its engines. trials: see `RulesCompiler`.

    Raises:
        StartupError: any subclass, with a message that says what to change.
        CheckpointError: the weights are corrupt, or quantized in an unsupported way.
    """
    device_thread = DeviceThread()
    return device_thread.run(_open, settings, device_thread, on_progress, trials)


def _open(
    settings: Settings, device_thread: DeviceThread, on_progress: Progress, trials: TrialParent | None
) -> ModelHost:
    """`open_model`, on the device thread."""
    device = pick_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
        if WHY_NOT is not None:
            logger.warning("the ops in C are not used, so a step takes longer: %s", WHY_NOT)
    if settings.scheme not in PRESETS or not PRESETS[settings.scheme].is_int8:
        served = ", ".join(name for name, scheme in PRESETS.items() if scheme.is_int8)
        raise InvalidSettings(f"scheme = {settings.scheme!r} is not an int8 scheme; choose one of {served}")
    folder = resolve_model(settings.model, settings.cache_dir, lambda stage: on_progress(stage, 0, 0))
    # Fails on an unsupported model before minutes of quantizing rather than after.
    num_rows = ModelConfig.load(folder, settings.max_model_len).vocab_size
    tokens_folder = tokenizer_folder(folder, settings.cache_dir)
    tokenizer = Tokenizer.from_folder(tokens_folder)
    _refuse_alien(tokenizer, tokens_folder, num_rows)
    group = None
    if settings.tensor_parallel > 1:
        # What is told to other ranks must have room for the tokens of a sink.
        config = ModelConfig.load(folder, settings.max_model_len, MAX_SINK_TOKENS)
        refuse_uneven(config, settings.tensor_parallel)
        refuse_missing_gpus(device, settings.tensor_parallel)
        on_progress(f"starting {settings.tensor_parallel} ranks", 0, 0)
        group = RankGroup(settings, layout_of(settings, config, device), device)
    try:
        loaded = {
            name: load_variant(name, folder, settings, device, on_progress, group=group) for name in settings.variants
        }
    except BaseException:
        if group is not None:
            group.close()
        raise
    # Several ranks make sure that steps of the new weights fit, too: one that runs out of memory would end all.
    reloadable = [
        variant.decoder.weight_bytes + (0 if group is None else step_bytes(variant.decoder, settings))
        for name, variant in loaded.items()
        if name != BASELINE
    ]
    room = max(reloadable, default=0) if settings.reload_room else 0
    host = ModelHost(
        settings.model or folder.name,
        tokenizer,
        folder=tokens_folder,
        device_thread=device_thread,
        group=group,
        busy_poll_s=busy_poll_s(settings, is_gpu=device.type == "cuda"),
        sampling_defaults={} if settings.generation_config == "none" else sampling_defaults(tokens_folder),
        grammars=RulesCompiler(
            partial(tokenizer.vocabulary, num_rows),
            frozenset(i for i in tokenizer.eos_ids if 0 <= i < num_rows),
            grammar_limits(settings),
            trials,
        ),
    )
    try:
        for name, variant in loaded.items():
            left = [other.decoder for key, other in loaded.items() if key not in host.variants]
            steps = sum(step_bytes(decoder, settings) for decoder in left)
            num_free = None if group is None else min(each[1] for each in group.measured(device, {}))
            budget = settings.kv_cache_bytes or cache_budget(device, len(left), room, steps, num_free)
            host.variants[name] = start_variant(
                name,
                variant,
                settings,
                kv_cache_bytes=budget,
                device_thread=device_thread,
                eos_ids=tokenizer.eos_ids,
                grammars=host.grammars,
                on_progress=on_progress,
                group=group,
            )
    except BaseException:
        host.stop()
        raise
    return host


def _refuse_alien(tokenizer: Tokenizer, folder: Path, num_rows: int) -> None:
    """Raise UnsupportedModel if ordinary text has tokens for which the model has no row; warn if any token has none.

    Text that has such a token anyway is refused request by request.
    """
    try:
        encoded = [tokenizer.encode(text) for text in CHECK_PROMPTS]
    except InvalidRequest as error:
        raise UnsupportedModel(f"{folder}: of ordinary text, {error.message}") from error
    with library_faults(partial(unusable, folder)):
        for ids in encoded:
            detokenizer = tokenizer.detokenizer()
            for token_id in ids:
                detokenizer.push(token_id)
    if not all(encoded):
        raise UnsupportedModel(f"{folder}: the tokenizer makes no token of ordinary text; use the model's own one")
    beyond = max(map(max, encoded))
    if beyond >= num_rows:
        raise UnsupportedModel(
            f"{folder}: the tokenizer makes token {beyond} ({tokenizer.token_text(beyond)!r}) of ordinary text, but "
            f"the model's token ids run from 0 to {num_rows - 1}: they do not belong together; use the model's own one"
        )
    if tokenizer.vocab_size > num_rows:
        logger.warning(
            "%s: the tokenizer knows tokens up to %d (%r), the model only up to %d; requests with others are refused",
            folder,
            tokenizer.vocab_size - 1,
            tokenizer.token_text(tokenizer.vocab_size - 1),
            num_rows - 1,
        )


def _gpu_memory_bytes(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
