"""Access control: API key, its limits, and the size of the body."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import OttavaError, TooLarge
from service.settings import PublicRoute, Settings
from service.telemetry.metrics import NO_VARIANT, REJECTED
from service.telemetry.record import ANONYMOUS, RequestRecord
from service.web.failures import refusal
from service.web.keys import Keyring
from service.web.openapi import amend
from service.web.state import Serving

ALWAYS_PUBLIC = frozenset({"/health", "/ready"})
"""Probes of an orchestrator send no key, and the answers reveal nothing."""

PUBLIC_PATHS: dict[PublicRoute, frozenset[str]] = {
    "page": frozenset({"/"}),
    "docs": frozenset({"/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"}),
    "info": frozenset({"/info"}),
    "metrics": frozenset({"/metrics"}),
}
PAGE_FILES = "/page/"
ADMIN = "/admin/"
API_KEY = "x-api-key"
COUNTED = frozenset({"/generate", "/tokenize", "/detokenize"})


class Gate:
    """Refuses requests without a valid key or above a limit, before their body is read.

    Every path needs a key except those that the settings make public, so a new route is protected by default; one below
    ADMIN needs an admin key. The limits of a key count generations only.
    """

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app = app
        self._serving = serving
        self._max_body_bytes = serving.settings.max_body_bytes
        self._public = public_paths(serving.settings)
        self._has_public_page = "page" in serving.settings.public_routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record: RequestRecord = scope["state"]["record"]
        counts = is_generation(scope)
        try:
            self._admit(scope, record, counts)
        except OttavaError as error:
            self._serving.metrics.refused_for(error)
            if counts:
                self._serving.metrics.count(NO_VARIANT, REJECTED)
            await refusal(error, scope["path"])(scope, receive, send)
            return
        try:
            await self._app(scope, _limited(receive, self._max_body_bytes), send)
        finally:
            if counts:
                self._serving.lifecycle.leave()
                took_s = time.perf_counter() - record.received_s
                self._serving.limits.leave(record.key, took_s, record.num_answers)

    def _admit(self, scope: Scope, record: RequestRecord, counts: bool) -> None:
        """Set the key's name in the record and, if it `counts` as a generation, count it as running.

        Raises:
            Unauthorized, Forbidden, TooLarge, Draining, RateLimited: the request is refused, and nothing is counted.
        """
        headers = Headers(scope=scope)
        record.key = self._key_of(scope["path"], _authorization(headers))
        refuse_declared(headers, self._max_body_bytes)
        if counts:
            self._serving.lifecycle.refuse_if_draining()
            self._serving.limits.enter(record.key)
            self._serving.lifecycle.enter()

    def _key_of(self, path: str, authorization: str | None) -> str:
        """The name of the key that a request came with. Raises Unauthorized or Forbidden if the path needs another."""
        keys = self._serving.keys
        if self._is_public(path):
            return ANONYMOUS
        return keys.admin_name_of(authorization) if path.startswith(ADMIN) else keys.name_of(authorization)

    def _is_public(self, path: str) -> bool:
        return path in self._public or (self._has_public_page and path.startswith(PAGE_FILES))


def public_paths(settings: Settings) -> frozenset[str]:
    """The paths that need no key under these settings, without the page's files."""
    return ALWAYS_PUBLIC.union(*(PUBLIC_PATHS[route] for route in settings.public_routes))


def document_keys(app: FastAPI, keys: Keyring, settings: Settings) -> None:
    """Mark in the app's OpenAPI which requests need a key, and which an admin key, so that /docs asks for them."""

    def add(document: dict[str, Any]) -> None:
        kinds = {"key": not keys.is_empty, "admin": keys.has_admins}
        document.setdefault("components", {})["securitySchemes"] = {
            name: {"type": "http", "scheme": "bearer"} for name, is_used in kinds.items() if is_used
        }
        if kinds["key"]:
            document["security"] = [{"key": []}]
        public = public_paths(settings)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if path.startswith(ADMIN) and kinds["admin"]:
                    operation["security"] = [{"admin": []}]
                elif path in public:
                    operation["security"] = []

    amend(app, add)


def _authorization(headers: Headers) -> str | None:
    """The Authorization header or, as Anthropic's clients send it, the key in `x-api-key`."""
    key = headers.get(API_KEY)
    return headers.get("authorization") or (None if key is None else f"Bearer {key}")


def is_generation(scope: Scope) -> bool:
    """Whether a request is for tokens, which limits and draining count."""
    path: str = scope["path"]
    return scope["method"] == "POST" and (path in COUNTED or path.startswith("/v1/"))


def _limited(receive: Receive, max_body_bytes: int) -> Receive:
    """Wrap receive to refuse with 413 once more than max_body_bytes have arrived: chunked bodies declare no length."""
    num_bytes = 0

    async def limited() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_body_bytes:
            # FastAPI's body reader passes only HTTPException through.
            error = too_large(max_body_bytes, "longer")
            raise HTTPException(error.status, error.message) from error
        return message

    return limited


def refuse_declared(headers: Headers, max_body_bytes: int) -> None:
    """Raise TooLarge if the request declares a body above the limit."""
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_body_bytes:
        raise too_large(max_body_bytes, f"{length} bytes")


def too_large(max_body_bytes: int, given: str) -> TooLarge:
    return TooLarge(f"the body is {given}; the limit is {max_body_bytes} bytes; send a shorter prompt")
