"""The page in a real Chromium: the app over fake engines on a port of its own, and a browser that visits it."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.engine.api import OneToken, VariantInfo
from service.web.uvicorn_config import server_config
from tests.support.fake_engine import INFO, FakeEngine
from tests.support.harness import app_of

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
START_S = 30.0
WEIGHTS = {"w8a8": 182_000_000, "fp16": 325_000_000}
DESCRIPTIONS = {
    "w8a8": "int8 weights with one scale per output channel, int8 activations with one scale per token.",
    "fp16": "weights and activations in fp16.",
}


def described(name: str) -> VariantInfo:
    """What the page is told of a variant."""
    return VariantInfo(
        scheme=name,
        description=DESCRIPTIONS[name],
        alpha=None,
        calibration=None,
        dtype="float16",
        kv_cache_dtype="float16",
        weight_bytes=WEIGHTS[name],
        kv_cache_bytes=1000,
        max_num_requests=64,
        checkpoint=None,
        generation=1,
        loaded_at="2024-05-06T00:00:00+00:00",
    )


def page_app(engines: Mapping[str, FakeEngine], **settings: Any) -> FastAPI:
    """The app with an /info that the page can show; variants are those of the engines."""
    info = replace(
        INFO,
        model="SmolLM2-135M-Instruct",
        device="NVIDIA H100 80GB HBM3",
        variants={name: described(name) for name in engines},
        one_token=OneToken({}, {}, "For one token, a step reads weights of 163 MB in w8a8 and 269 MB in fp16."),
    )
    return app_of(engines, info=info, **settings)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app on a loopback port, in a thread: the browser's driver wants this one for itself."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        server_config(app, app.state.serving.settings, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    end = time.monotonic() + START_S
    while not (server.started and app.state.serving.is_ready) and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_S)
        listener.close()
