"""The middleware, from the outermost in: envelope, names, CORS, faults, gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from service.telemetry.record import RequestRecord
from service.web.middleware.envelope import REQUEST_ID, Envelope
from service.web.middleware.faults import Faults
from service.web.middleware.gate import API_KEY, Gate, document_keys
from service.web.middleware.names import KnownNames, names_of
from service.web.state import Serving


def surround(
    app: FastAPI,
    serving: Serving,
    on_end: Sequence[Callable[[RequestRecord], None]],
    on_start: Sequence[Callable[[RequestRecord], None]] = (),
) -> None:
    """Add the middleware to an app. on_start, on_end: see `Envelope`."""
    settings = serving.settings
    document_keys(app, serving.keys, settings)
    app.add_middleware(Gate, serving=serving)
    app.add_middleware(Faults)
    if settings.cors_origins:
        # Outside the gate, because a preflight has no key, and a page must be able to read a refusal.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", API_KEY, "anthropic-version", "content-type", REQUEST_ID),
            expose_headers=(REQUEST_ID, "retry-after"),
        )
    names = names_of(settings, has_keys=not serving.keys.is_empty)
    if names is not None:
        app.add_middleware(KnownNames, names=names)
    app.add_middleware(Envelope, on_end=on_end, on_start=on_start)
