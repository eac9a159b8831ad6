"""Checks the Host header, which protects a local server from DNS rebinding."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import UnknownHost
from service.settings import Settings
from service.settings.fields import ANY
from service.web.failures import refusal
from service.web.keys import is_loopback

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
MAX_SHOWN = 80
_PORT = re.compile(r":\d*$")


def names_of(settings: Settings, has_keys: bool) -> tuple[str, ...] | None:
    """The host names that a server with these settings accepts, in lower case; None if it accepts all.

    With DNS rebinding, a web page points its own domain at 127.0.0.1. To the browser the local server then has the
    page's own origin, so CORS does not protect a server without keys. Only the Host header shows the foreign name.
    """
    is_open = ANY in settings.allowed_hosts or (
        not settings.allowed_hosts and (has_keys or not is_loopback(settings.host))
    )
    if is_open:
        return None
    host = settings.host.lower()
    return tuple(dict.fromkeys((*LOCAL_NAMES, f"[{host}]" if ":" in host else host, *settings.allowed_hosts)))


class KnownNames:
    """Refuses with 421 a request whose Host header names another server.

    Starlette's TrustedHostMiddleware is not used because it answers in plain text. Requests without the header are
    accepted: browsers always send it, but HTTP/1.0 probes do not.
    """

    def __init__(self, app: ASGIApp, names: tuple[str, ...]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if host is None or _PORT.sub("", host).lower() in self._names:
            await self._app(scope, receive, send)
            return
        error = UnknownHost(
            f"the host is {host[:MAX_SHOWN]!r}, which is no name of this server; it answers to "
            f"{', '.join(self._names)}: use one of them, or start it with --allowed-hosts and this one"
        )
        await refusal(error, scope["path"])(scope, receive, send)
