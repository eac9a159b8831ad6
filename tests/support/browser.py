"""The page in a real Chromium: the app over fake engines on a port of its own, and a browser that visits it."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from service.settings import Settings
from service.web.app import create_app
from tests.support.fake_engine import ByteTokenizer, FakeEngine

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
START_S = 30.0
WEIGHTS = {"w8a8": 182_000_000, "fp16": 325_000_000}
INFO = {
    "model": "SmolLM2-135M-Instruct",
    "device": "NVIDIA H100 80GB HBM3",
    "variants": {
        "w8a8": {
            "description": "int8 weights with one scale per output channel, int8 activations with one scale per token.",
            "weight_bytes": WEIGHTS["w8a8"],
        },
        "fp16": {"description": "weights and activations in fp16.", "weight_bytes": WEIGHTS["fp16"]},
    },
    "one_token": {"text": "For one token, a step reads weights of 163 MB in w8a8 and 269 MB in fp16."},
    "versions": {"ottava": "0"},
}


def page_app(engines: Mapping[str, FakeEngine], **settings: object) -> FastAPI:
    """The app with an /info that the page can show; variants are those of the engines."""
    info = INFO | {"variants": {name: INFO["variants"][name] for name in engines}}
    return create_app(engines, Settings(**settings), ByteTokenizer(), lambda: info, dict)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app on a loopback port, in a thread: the browser's driver wants this one for itself."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", http="h11", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    end = time.monotonic() + START_S
    while not (server.started and app.state.serving.refused is not None) and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_S)
        listener.close()
