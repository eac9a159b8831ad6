"""Answers unexpected exceptions with 500."""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Receive, Scope, Send

from service.telemetry.record import RequestRecord
from service.web.failures import answer, internal_error

log = logging.getLogger(__name__)


class Faults:
    """Answers an `ErrorResponse` with status 500 if anything inside raises. A response that has begun is cut off."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record: RequestRecord = scope["state"]["record"]
        try:
            await self._app(scope, receive, send)
        except Exception:
            log.exception("request %s: %s %r failed", record.id, record.method, record.path)
            if record.status is not None:
                raise
            await answer(500, internal_error(), record.path)(scope, receive, send)
