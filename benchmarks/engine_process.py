"""The engine of `benchmarks.overhead` in a process of its own, served as `ottava serve` does.

python -m benchmarks.engine_process ARGUMENTS N      ARGUMENTS: those of the benchmark, as JSON; N: see below
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.paced import PacedRunner, made_tokenizer, paced_engine
from benchmarks.shapes import SHAPES
from quant.scheme import PRESETS
from service.engine.api import HostInfo, OneToken
from service.engine.device.device_thread import DeviceThread
from service.engine.loop import EngineLoop
from service.host.channel.messages import Open, ToEngine
from service.host.channel.socket import ThreadEnd
from service.host.memory import cache_budget
from service.host.server import HostServer, nothing_to_reload, run
from service.host.variants import Loaded, start_variant
from service.models.config import ModelConfig
from service.models.devices import pick_device, pick_dtype
from service.models.loader import load_decoder
from service.models.random_weights import random_decoder
from service.settings import Settings, load_settings
from service.store.calibration import Calibration, calibration_text
from service.store.progress import Progress
from service.store.quantized import quantized_folder
from service.store.resolve import resolve_model
from service.text.tokenizer import Tokenizer

VARIANT = "w8a8"


class OneEngine:
    """A host of one engine; see `service.host.server.ServedHost`."""

    grammars = None
    reload = staticmethod(nothing_to_reload)
    tokenizer_folder = Path()
    busy_poll_s = 0.0

    def __init__(self, engine: EngineLoop, vocab_size: int) -> None:
        self.engines = {VARIANT: engine}
        self._vocab_size = vocab_size

    def info(self) -> HostInfo:
        max_model_len = self.engines[VARIANT].max_model_len
        one_token = OneToken({}, {}, "")
        return HostInfo("overhead", "", max_model_len, self._vocab_size, {}, one_token, {}, "", None, {}, 1, [])

    def self_check(self) -> dict[str, str]:
        return {}

    def stop(self, timeout_s: float = 10.0) -> None:
        self.engines[VARIANT].stop(timeout_s)


def main() -> None:
    args = argparse.Namespace(**json.loads(sys.argv[1]))
    channel = ThreadEnd(socket.socket(fileno=int(sys.argv[2])), msgspec.msgpack.Decoder(ToEngine))
    opening = channel.read_one()
    assert isinstance(opening, Open)
    run(HostServer(partial(open_engine, args, load_settings(**opening.settings)), channel.send), channel)


def open_engine(args: argparse.Namespace, settings: Settings, _: Progress) -> OneEngine:
    """The engine that the benchmark's arguments name, started."""
    tokenizer = tokenizer_of(args, settings)
    if args.engine == "paced":
        return OneEngine(paced(args, settings, tokenizer), tokenizer.vocab_size)
    device_thread = DeviceThread()
    return OneEngine(device_thread.run(real, args, settings, device_thread), tokenizer.vocab_size)


def paced(args: argparse.Namespace, settings: Settings, tokenizer: Tokenizer) -> EngineLoop:
    said = tokenizer.encode(calibration_text(None)[:20_000])
    runner = PacedRunner(said, args.step_ms / 1e3, args.launch_ms / 1e3, args.acquires)
    return paced_engine(VARIANT, runner, context_of(args), settings)


def real(args: argparse.Namespace, settings: Settings, device_thread: DeviceThread) -> EngineLoop:
    """The model behind its engine; called on the thread that computes."""
    device, scheme = pick_device("auto"), PRESETS[VARIANT]
    if args.shape:
        config = ModelConfig.of(SHAPES[args.shape], context_of(args))
        decoder, folder = random_decoder(config, scheme, pick_dtype("auto", config, device), device), None
    else:
        source = resolve_model(args.model, settings.cache_dir)
        dtype = pick_dtype("auto", ModelConfig.load(source), device)
        folder = quantized_folder(source, scheme, Calibration(), settings.cache_dir, device)
        decoder = load_decoder(folder, dtype, device, context_of(args), scheme.kv)
    variant = start_variant(
        VARIANT,
        Loaded(decoder, {"scheme": scheme.name}, folder),
        settings,
        kv_cache_bytes=cache_budget(device, 1),
        device_thread=device_thread,
        eos_ids=frozenset(),
    )
    return variant.engine


def tokenizer_of(args: argparse.Namespace, settings: Settings) -> Tokenizer:
    """A made vocabulary of the shape's size, or the model's own."""
    if args.shape:
        return made_tokenizer(SHAPES[args.shape].vocab_size)
    return Tokenizer.from_folder(resolve_model(args.model, settings.cache_dir))


def context_of(args: argparse.Namespace) -> int:
    return int(args.prompt + args.tokens + 16)


def as_words(args: argparse.Namespace) -> str:
    """The arguments as this process takes them."""
    plain: dict[str, Any] = {name: getattr(args, name) for name in _TAKEN}
    return json.dumps(plain)


_TAKEN = ("engine", "model", "shape", "step_ms", "launch_ms", "acquires", "prompt", "tokens")


if __name__ == "__main__":
    main()
