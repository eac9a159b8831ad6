"""Replaces a host's int8 checkpoint while requests run: `Reloader`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from quant.checkpoint.reader import Checkpoint
from quant.errors import QuantError
from quant.part import WHOLE, Part
from quant.scheme import Scheme
from service.engine.api import Reloaded
from service.engine.device.device_thread import DeviceThread
from service.engine.device.runner import Runner
from service.errors import EngineFailed, InvalidRequest, ReloadFailed, SelfCheckFailed, StartupError, first_line
from service.host.memory import cache_blocks, step_bytes
from service.host.model_host import ModelHost, open_model
from service.host.ranks.messages import key_of
from service.host.self_check import CHECK_PROMPTS
from service.host.variants import Variant, refuse_drafts, runner_for, variant_notes
from service.models.config import ModelConfig
from service.models.decoder import Decoder
from service.models.loader import decoder_of, opened, refuse_unsafe
from service.models.weights import Linear, Weights
from service.process import settle
from service.settings import BASELINE, Settings
from service.store.progress import Progress, silent
from service.store.resolve import is_quantized
from service.store.tokenizer import tokenizer_folder
from service.text.grammars.trials import TrialParent
from service.text.tokenizer import Tokenizer

P = ParamSpec("P")
R = TypeVar("R")

REFUSALS = (StartupError, QuantError, EngineFailed, OSError, torch.OutOfMemoryError)

log = logging.getLogger(__name__)


class InTurns:
    """Reads weights one tensor at a time on the device thread, so that engine steps can run in between."""

    def __init__(self, weights: Weights, device_thread: DeviceThread) -> None:
        self._weights = weights
        self._device_thread = device_thread

    def tensor(self, name: str, shape: tuple[int, ...], part: Part = WHOLE) -> Tensor:
        """See `Weights`."""
        return self._device_thread.run(torch.inference_mode()(self._weights.tensor), name, shape, part)

    def linear(
        self,
        name: str,
        out_features: int,
        in_features: int,
        has_bias: bool,
        *,
        is_transposed: bool = False,
        part: Part = WHOLE,
    ) -> Linear:
        """See `Weights`."""
        read = partial(torch.inference_mode()(self._weights.linear), is_transposed=is_transposed, part=part)
        return self._device_thread.run(read, name, out_features, in_features, has_bias)

    def differs(self, name: str, other: str) -> bool:
        """See `Weights`."""
        return self._weights.differs(name, other)


class Reloader:
    """Implements `service.host.model_host.Reload`. Call it on its own thread, one call at a time.

    The new weights are loaded next to the old ones, checked against the baseline, and warmed up on the KV cache in use,
    all in between the engines' steps. Only then does the engine stop starting requests, let the running ones finish for
    at most reload_wait_s, and continue with the new weights. If anything fails before that, nothing has changed.

    Several ranks load at the same time, and what one of them cannot load, none serves. From the self-check on they need
    each other: a fault there ends the engines' process, which is started again with the weights of the settings.
    """

    def __init__(self, host: ModelHost, settings: Settings) -> None:
        self._host = host
        self._settings = settings

    def __call__(self, model: str | None) -> Reloaded:
        """Serve the checkpoint of a folder, or re-read the present one if None.

        Raises:
            InvalidRequest: the name is of no folder below `reload_root`.
            ReloadFailed: no int8 variant is served or its engine has failed; the folder is corrupt, not quantized, or
                of another architecture or tokenizer; memory is short; or the self-check refuses it.
        """
        name = next((name for name in self._host.variants if name != BASELINE), None)
        if name is None:
            raise ReloadFailed(f"only {BASELINE} is served here, so there is no int8 checkpoint to reload")
        folder = _folder(self._host.variants[name], model, self._settings.reload_root)
        try:
            reloaded = self._serve(name, folder)
        # A traceback's frames refer to the new weights, so an error that is kept would keep their memory.
        except ReloadFailed as error:
            raise error.with_traceback(None) from None
        except REFUSALS as error:
            why = f"{folder} is not served, the old weights are: {first_line(error)}"
            raise ReloadFailed(why, "model") from error.with_traceback(None)
        except Exception as error:
            log.exception("the reload of %s failed", folder)
            raise error.with_traceback(None) from None
        # The old weights were frozen out of garbage collection; in a reference cycle they would never be freed.
        settle()
        return reloaded

    def _serve(self, name: str, folder: Path) -> Reloaded:
        start_s, old = time.perf_counter(), self._host.variants[name]
        generation = old.generation + 1
        with self._dropped_if_it_fails(key_of(name, generation)):
            checkpoint, decoder = self._load(name, old, folder)
            with self._needing_all_ranks():
                divergence = self._host.check(name, decoder, generation)
            num_blocks, runner = self._warm(name, old, decoder)
            pause_s = time.perf_counter()
            log.info("%s: %s is loaded and checked; it takes over when the running requests are done", name, folder)
            old.engine.exchange(runner, num_blocks, decoder.weight_bytes, self._settings.reload_wait_s).result()
        end_s = time.perf_counter()
        new = replace(
            old,
            decoder=decoder,
            runner=runner,
            notes=variant_notes(checkpoint, decoder, Scheme.preset(self._settings.scheme)),
            folder=folder,
            generation=generation,
            loaded_at=datetime.now(UTC),
            self_check_kl=divergence,
        )
        self._host.variants[name] = new
        # Beside nothing else that uses the device.
        self._host.device_thread.run(old.runner.close)
        if self._host.group is not None:
            self._host.device_thread.run(self._host.group.drop, key_of(name, old.generation))
        return Reloaded(name, folder.name, new.generation, new.loaded_at, pause_s - start_s, end_s - pause_s)

    @contextmanager
    def _dropped_if_it_fails(self, key: str) -> Iterator[None]:
        """The other ranks let go of the new weights after an exception inside."""
        try:
            yield
        except BaseException:
            if self._host.group is not None:
                self._host.device_thread.run(self._host.group.drop, key)
            raise

    @contextmanager
    def _needing_all_ranks(self) -> Iterator[None]:
        """End the engines' process after a fault inside, for which other ranks would wait for ever."""
        try:
            yield
        except SelfCheckFailed:
            # Found in logits that all ranks have computed to the end.
            raise
        except Exception as error:
            if self._host.group is not None:
                log.exception("a reload cannot go on, and other ranks wait for it")
                self._host.group.end(f"the first rank raised {type(error).__name__} in a reload")
            raise

    def _load(self, name: str, old: Variant, folder: Path) -> tuple[Checkpoint, Decoder]:
        """Load the decoder of a folder, on all ranks; raises if it cannot replace the old one."""
        refuse_unsafe(folder)
        if not is_quantized(folder):
            raise ReloadFailed(
                f"{folder} is not quantized, so it cannot replace an int8 variant: run `ottava quantize {folder} OUT` "
                "and name OUT",
                "model",
            )
        served = old.decoder
        config, checkpoint = opened(folder, served.dtype, old.runner.device, old.engine.max_model_len)
        _refuse_other_sink(folder, checkpoint.sink_ids, served.sink_ids)
        _refuse_other_architecture(folder, config, served.config)
        self._refuse_other_tokenizer(folder)
        weights, group = InTurns(checkpoint, self._host.device_thread), self._host.group
        if group is None:
            decoder = decoder_of(config, checkpoint, self._settings.kv, weights=weights)
        else:
            group.prepare(key_of(name, old.generation + 1), folder, served.dtype)
            try:
                decoder = decoder_of(config, checkpoint, self._settings.kv, weights=weights, ranks=group.ranks)
            finally:
                faults = group.prepared()
            if faults:
                raise ReloadFailed(f"{folder} is not served, the old weights are: {'; '.join(faults)}", "model")
        checkpoint.files.refuse_changed()
        if self._settings.quantize_head:
            self._host.device_thread.run(torch.inference_mode()(decoder.quantize_head))
        refuse_drafts(old.engine.variant, decoder, self._settings)
        return checkpoint, decoder

    def _warm(self, name: str, old: Variant, decoder: Decoder) -> tuple[int, Runner]:
        """A warmed-up runner for the decoder, and its blocks. It takes over the old KV cache if the type matches."""
        settings, device_thread = self._settings, self._host.device_thread
        fits = (decoder.kv, decoder.kv_dtype) == (old.decoder.kv, old.decoder.kv_dtype)
        num_blocks = old.engine.stats().num_blocks
        if not fits:
            num_blocks = cache_blocks(name, decoder, settings, old.cache_budget_bytes)
        self._refuse_short_memory(decoder, 0 if fits else num_blocks)
        key = key_of(name, old.generation + 1)

        def made() -> Runner:
            group, caches = self._host.group, old.runner.caches if fits else None
            if group is not None:
                group.start(key, num_blocks, key_of(name, old.generation) if fits else None)
            lead = None if group is None else group.lead(key)
            return runner_for(decoder, num_blocks, settings, caches=caches, lead=lead)

        with self._needing_all_ranks():
            runner = device_thread.run(made)
            pieces = runner.warming()
            while device_thread.run(next, pieces, None) is not None:
                pass
        return num_blocks, runner

    def _refuse_short_memory(self, decoder: Decoder, num_blocks: int) -> None:
        """Raise ReloadFailed if a rank's GPU has no room for the steps and the new blocks, since one that ran out of
        memory would end all. Alone, a rank that does may raise."""
        host, device = self._host, decoder.embedding.device
        if host.group is None or device.type != "cuda":
            return
        cache_bytes = num_blocks * self._settings.block_size * decoder.kv_bytes_per_token
        num_needed = step_bytes(decoder, self._settings) + cache_bytes
        num_free = min(each[1] for each in host.device_thread.run(host.group.measured, device, {}))
        if num_free < num_needed:
            raise ReloadFailed(
                f"a rank's GPU has {num_free / 2**20:.0f} MiB free beside the new weights, and their steps need "
                f"{num_needed / 2**20:.0f}: the old weights are served; start a new server with a lower kv_cache_bytes"
            )

    def _refuse_other_tokenizer(self, folder: Path) -> None:
        served = self._host.tokenizer
        other = Tokenizer.from_folder(tokenizer_folder(folder, self._settings.cache_dir))
        agree = all(served.encode(text) == other.encode(text) for text in CHECK_PROMPTS)
        if not agree or served.eos_ids != other.eos_ids:
            raise ReloadFailed(
                f"{folder} has another tokenizer or other end tokens than the model that is served; start a server "
                "for it",
                "model",
            )


def open_host(settings: Settings, on_progress: Progress = silent, trials: TrialParent | None = None) -> ModelHost:
    """`open_model`, with a host that can be reloaded. Raises as `open_model`."""
    host = open_model(settings, on_progress, trials)
    host.reload = Reloader(host, settings)
    return host


def _folder(old: Variant, model: str | None, root: Path | None) -> Path:
    """The folder to read. Raises InvalidRequest, with one answer for all that is not a folder below the root."""
    if model is None:
        if old.folder is None:
            raise ReloadFailed("random weights are served, so there is no folder to read again; name one as `model`")
        return old.folder
    if root is None:
        raise InvalidRequest(
            "`model` names a folder, but this server has no reload_root; leave `model` out to read the served folder "
            "again, or start it with --reload-root",
            "model",
        )
    try:
        top = root.resolve()
        folder = (top / model).resolve()
        is_below = top in folder.parents and folder.is_dir()
    # Names with a NUL, half a surrogate pair, too many letters or a loop of links; folders that may not be entered.
    except (OSError, RuntimeError, ValueError):
        is_below = False
    if not is_below:
        raise InvalidRequest(
            f"`model` is {model[:80]!r}, which is no folder below this server's reload_root; name one that is", "model"
        )
    return folder


def _refuse_other_sink(folder: Path, new: tuple[int, ...], old: tuple[int, ...]) -> None:
    """Raise ReloadFailed if texts begin with other tokens for the new weights: requests that wait have the old ones."""
    if new != old:
        raise ReloadFailed(
            f"{folder} was quantized with the sink {list(new)}, and the served model with {list(old)}; start a server "
            "for it",
            "model",
        )


def _refuse_other_architecture(folder: Path, config: ModelConfig, served: ModelConfig) -> None:
    """Raise ReloadFailed if the configs differ in more than the dtype in which the model was saved."""
    for field in fields(ModelConfig):
        new, old = getattr(config, field.name), getattr(served, field.name)
        if field.compare and field.name != "dtype" and new != old:
            raise ReloadFailed(
                f"{folder} is of another architecture: its {field.name} is {new}, that of the served model {old}; "
                "start a server for it",
                "model",
            )
